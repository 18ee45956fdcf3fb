"""The end of the rental, against simulated platforms."""

from __future__ import annotations

import os
import stat
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from job.cloud.api import Patience
from job.cloud.self_stop import Rental, find_rental
from job.errors import MachineError, UsageError
from tests.fakes.cloud import KEY, RunPodServer, VastServer
from tests.fakes.fault_proxy import FaultProxy

QUICK = Patience(tries=4, first_wait=0.01, longest_wait=0.05)


@pytest.fixture
def vast() -> Iterator[VastServer]:
    with VastServer() as server:
        server.add_instance(12345)
        yield server


@pytest.fixture
def runpod() -> Iterator[RunPodServer]:
    with RunPodServer() as server:
        server.add_pod("abc123")
        yield server


def on_vast(url: str, **env: str) -> Rental:
    values = {"CONTAINER_ID": "12345", "CONTAINER_API_KEY": KEY, "VAST_URL": url, **env}
    rental = find_rental(values, patience=QUICK)
    assert rental is not None
    return rental


def on_runpod(url: str, **env: str) -> Rental:
    values = {"RUNPOD_POD_ID": "abc123", "RUNPOD_API_KEY": KEY, "RUNPOD_API_BASE_URL": url, **env}
    rental = find_rental(values, patience=QUICK)
    assert rental is not None
    return rental


def alarms(workspace: Path) -> list[Path]:
    return list(workspace.glob("RENTAL-NOT-ENDED-*"))


def test_where_this_process_runs() -> None:
    assert find_rental({}) is None
    # A foreign CONTAINER_ID is no rental.
    assert find_rental({"CONTAINER_ID": "12345"}) is None
    assert find_rental({"CONTAINER_ID": "f00ba4", "CONTAINER_API_KEY": "x"}) is None
    labelled = find_rental({"CONTAINER_ID": "f00ba4", "VAST_CONTAINERLABEL": "C.77", "CONTAINER_API_KEY": KEY})
    assert labelled is not None
    assert (labelled.platform, labelled.instance) == ("Vast.ai", "77")
    pod = find_rental({"RUNPOD_POD_ID": "abc", "RUNPOD_API_KEY": KEY})
    assert pod is not None
    assert (pod.platform, pod.instance) == ("RunPod", "abc")
    assert KEY not in repr(pod) + repr(labelled)


def test_the_key_goes_to_no_plain_http_address() -> None:
    with pytest.raises(UsageError):
        on_vast("http://example.org").check()


def test_vast_is_asked_for_the_instance_and_its_price(vast: VastServer) -> None:
    rental = on_vast(vast.url)
    assert rental.check() == "Vast.ai instance 12345: running (running), $0.412 an hour"
    assert rental.price() == 0.4125
    assert {request.method for request in vast.requests} == {"GET"}


def test_runpod_is_asked_for_the_pod_and_its_price(runpod: RunPodServer) -> None:
    rental = on_runpod(runpod.url)
    assert "RunPod instance abc123: running" in rental.check()
    assert rental.price() == 3.59
    runpod.pods["abc123"]["cost"] = 0.0  # reported for pods that do not run
    assert rental.price() is None


def test_a_key_that_is_refused_or_missing_is_found_before_the_job(vast: VastServer, runpod: RunPodServer) -> None:
    for rental in (on_vast(vast.url, CONTAINER_API_KEY="wrong-key-98765432"), on_runpod(runpod.url, RUNPOD_API_KEY="")):
        with pytest.raises(MachineError) as caught:
            rental.check()
        assert "--when-done nothing" in caught.value.remedy
        assert "API_KEY" in caught.value.remedy
        assert "98765432" not in caught.value.line
        assert caught.value.exit_code == 76
        assert rental.price() is None


def test_an_instance_that_is_not_there(vast: VastServer, runpod: RunPodServer, tmp_path: Path) -> None:
    vast.instances.clear()
    runpod.pods.clear()
    for rental in (on_vast(vast.url), on_runpod(runpod.url)):
        with pytest.raises(MachineError, match="has no instance"):
            rental.check()
        assert rental.end("destroy", tmp_path, print).state == "taken"


def test_nothing_to_do_is_not_asked_for(vast: VastServer, tmp_path: Path) -> None:
    assert on_vast(vast.url).end("nothing", tmp_path, print).state == "none"
    assert vast.requests == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("fault", ["429", "503", "cut", "dropped"])
def test_the_end_is_insisted_on(vast: VastServer, tmp_path: Path, fault: str) -> None:
    said: list[str] = []
    if fault == "429":
        vast.fail("DELETE", status=429, headers={"Retry-After": "0"}, times=2)
    elif fault == "503":
        vast.fail("DELETE", status=503, times=3)
    elif fault == "dropped":
        vast.drop("DELETE")  # done, but the answer is lost: the second request finds nothing
    with FaultProxy("127.0.0.1", vast.port, cut_up=[20] if fault == "cut" else []) as line:
        assert on_vast(line.url).end("destroy", tmp_path, said.append).state == "taken"
    assert vast.instances == {}
    assert any("trying again" in text for text in said)
    assert alarms(tmp_path) == []
    assert KEY not in "".join(said)


def test_runpod_is_stopped_and_destroyed(runpod: RunPodServer, tmp_path: Path) -> None:
    assert on_runpod(runpod.url).end("stop", tmp_path, print).state == "taken"
    assert runpod.pods["abc123"]["status"] == "EXITED"
    assert on_runpod(runpod.url).end("destroy", tmp_path, print).state == "taken"
    assert runpod.pods == {}


def test_a_pod_that_is_stopped_already_counts(runpod: RunPodServer, tmp_path: Path) -> None:
    runpod.pods["abc123"]["status"] = "EXITED"
    assert on_runpod(runpod.url).end("stop", tmp_path, print).state == "taken"


def test_a_restart_after_a_stop_does_not_stop_for_ever(vast: VastServer, tmp_path: Path) -> None:
    said: list[str] = []
    assert on_vast(vast.url).end("stop", tmp_path, said.append).state == "taken"
    assert vast.instances[12345]["intended_status"] == "stopped"
    assert len(vast.asked("PUT")) == 1
    assert on_vast(vast.url).end("stop", tmp_path, said.append).state == "held back"
    assert len(vast.asked("PUT")) == 1
    assert "BILLS ON" in said[-1]
    # Another instance with the same (network) workspace is another rental and does not prevent destroying.
    vast.add_instance(777)
    other = on_vast(vast.url, CONTAINER_ID="777")
    assert other.end("stop", tmp_path, said.append).state == "taken"
    assert on_vast(vast.url).end("destroy", tmp_path, said.append).state == "taken"
    assert set(vast.instances) == {777}


def test_an_instance_that_outlives_its_destruction_is_destroyed_again(vast: VastServer, tmp_path: Path) -> None:
    assert on_vast(vast.url).end("destroy", tmp_path, print).state == "taken"
    vast.add_instance(12345)
    assert on_vast(vast.url).end("destroy", tmp_path, print).state == "taken"
    assert vast.instances == {}


@pytest.mark.parametrize("status", [409, 500])
def test_a_stopped_pod_is_not_taken_for_a_destroyed_one(runpod: RunPodServer, tmp_path: Path, status: int) -> None:
    runpod.pods["abc123"]["status"] = "EXITED"
    runpod.fail("DELETE", status=status)
    assert on_runpod(runpod.url).end("destroy", tmp_path, print).state == "failed"


def test_a_stop_that_fails_is_no_stop(runpod: RunPodServer, tmp_path: Path) -> None:
    runpod.fail("POST", "*/action", status=409)
    assert on_runpod(runpod.url).end("stop", tmp_path, print).state == "failed"
    runpod.pods["abc123"]["status"] = "EXITED"
    runpod.faults.clear()
    runpod.fail("POST", "*/action", status=403)
    assert on_runpod(runpod.url).end("stop", tmp_path, print).state == "failed"


def test_a_wait_that_is_asked_for_in_words_is_kept(vast: VastServer, tmp_path: Path) -> None:
    vast.fail("DELETE", status=429, message="API requests too frequent: endpoint threshold=0.8", times=1)
    begin = time.monotonic()
    assert on_vast(vast.url).end("destroy", tmp_path, print).state == "taken"
    assert time.monotonic() - begin >= 0.8


def test_the_sentinel_is_there_before_the_call_and_outside_of_jobs(vast: VastServer, tmp_path: Path) -> None:
    found: list[tuple[list[Path], str]] = []

    def look(_: str) -> None:
        files = list(tmp_path.rglob("*.json"))
        found.append((files, files[0].read_text()))

    on_vast(vast.url).end("stop", tmp_path, look)
    before, after = found[0], found[-1]
    assert before[0] == after[0] == [tmp_path / ".rentals" / "vast-12345.json"]
    assert '"state": "asked"' in before[1]
    assert '"state": "taken"' in after[1]
    assert KEY not in after[1]


def test_a_stop_of_unknown_outcome_is_asked_for_twice_and_no_more(vast: VastServer, tmp_path: Path) -> None:
    def killed(text: str) -> None:
        if text.startswith("ending"):
            raise KeyboardInterrupt

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            on_vast(vast.url).end("stop", tmp_path, killed)
    assert on_vast(vast.url).end("stop", tmp_path, print).state == "held back"
    assert vast.requests == []


@pytest.mark.parametrize("status", [401, 403, 500])
def test_a_failure_to_end_is_loud_and_lasting(vast: VastServer, tmp_path: Path, status: int) -> None:
    vast.fail("DELETE", status=status, message=f"no, {KEY}")
    said: list[str] = []
    ending = on_vast(vast.url).end("destroy", tmp_path, said.append)
    assert ending.state == "failed"
    assert "BILLS ON" in ending.problem
    assert "console.vast.ai" in ending.problem
    (alarm,) = alarms(tmp_path)
    assert "BILLS ON" in alarm.read_text()
    assert KEY not in alarm.read_text() + ending.problem + "".join(said)
    vast.faults.clear()
    assert on_vast(vast.url).end("destroy", tmp_path, said.append).state == "taken"
    assert alarms(tmp_path) == []


def test_a_platform_out_of_reach(tmp_path: Path, vast: VastServer) -> None:
    with FaultProxy("127.0.0.1", vast.port) as line:
        line.refusing = True
        rental = on_vast(line.url)
        with pytest.raises(MachineError, match="cannot be reached"):
            rental.check()
        assert rental.end("stop", tmp_path, print).state == "failed"


def test_a_failed_stop_is_tried_again_by_the_next_start(vast: VastServer, tmp_path: Path) -> None:
    rule = vast.fail("PUT", status=500)
    assert on_vast(vast.url).end("stop", tmp_path, print).state == "failed"
    rule.times = 0
    assert on_vast(vast.url).end("stop", tmp_path, print).state == "taken"


def test_a_workspace_that_cannot_be_written_keeps_no_rental(vast: VastServer, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    said: list[str] = []
    assert on_vast(vast.url).end("destroy", tmp_path / "file", said.append).state == "taken"
    assert any("cannot record the end" in text for text in said)
    vast.add_instance(12345)
    (tmp_path / ".rentals" / "vast-12345.json").mkdir(parents=True)
    assert on_vast(vast.url).end("stop", tmp_path, said.append).state == "taken"


def own_tool(folder: Path, url: str, old: bool) -> None:
    """Put a runpodctl with its own key for the same server on the path."""
    script = folder / "runpodctl"
    wanted = '["remove", "pod"]' if old else '["pod", "delete"]'
    script.write_text(
        f"#!{sys.executable}\n"
        "import sys, urllib.request\n"
        f"assert sys.argv[1:3] == {wanted}\n"
        f"request = urllib.request.Request('{url}/v2/pods/' + sys.argv[3], method='DELETE')\n"
        "request.add_header('Authorization', 'Bearer key-of-the-tool')\n"
        "urllib.request.urlopen(request)\n"
    )
    script.chmod(script.stat().st_mode | stat.S_IXUSR)


@pytest.mark.parametrize("old", [False, True])
def test_runpods_own_tool_is_the_last_resort(
    runpod: RunPodServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old: bool
) -> None:
    runpod.keys = {"key-of-the-tool"}
    assert on_runpod(runpod.url).end("destroy", tmp_path, print).state == "failed"
    own_tool(tmp_path, runpod.url, old)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert on_runpod(runpod.url).end("destroy", tmp_path, print).state == "taken"
    assert runpod.pods == {}
