"""No machine is forgotten, rented twice, or left to bill: on platforms that lag, lose labels, and disconnect."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from job.cloud import termination as ending
from job.cloud.launch_records import find_launch
from job.cloud.launching import Launcher
from job.cloud.provider import MARKER, Terms
from job.cloud.termination import Termination
from job.cloud.watching import Watch
from job.errors import MachineError
from tests.fakes.cloud import RunPodServer, VastServer
from tests.fakes.cloud.helpers import COMMAND, IMAGE, command, env_of, launcher, need

LABELS: dict[str, Callable[[str], str]] = {
    "dropped": lambda _: "",
    "cut": lambda label: label[:10],
    "cut late": lambda label: label[:16],
    "another": lambda _: "gentle_orange_fox",
}


def wait_until(done: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def on(server: VastServer | RunPodServer, tmp_path: Path, said: list[str], **changes: Any) -> Launcher:
    """Return a launcher whose platform offers two machines."""
    if isinstance(server, VastServer):
        server.add_ask(1, dph_total=1.0)
        server.add_ask(2, dph_total=1.1)
        return launcher(server, tmp_path, said, **changes)
    return launcher(server, tmp_path, said, **{"needs": (need("1xRTX4090"),), **changes})


def when(starter: Launcher, part: str, act: Callable[[], Any]) -> None:
    """Act on the launcher's first message with this part."""
    listen, pending = starter.say, [act]

    def say(text: str) -> None:
        listen(text)
        if part in text and pending:
            pending.pop()()

    starter.say = say


def machines(server: VastServer | RunPodServer) -> list[str]:
    return list(map(str, server.instances if isinstance(server, VastServer) else server.pods))


def creation(server: VastServer | RunPodServer) -> tuple[str, str]:
    return ("PUT", "/api/v0/asks/*") if isinstance(server, VastServer) else ("POST", "/v2/pods")


@pytest.fixture(params=["vast", "runpod"])
def server(request: pytest.FixtureRequest) -> VastServer | RunPodServer:
    found: VastServer | RunPodServer = request.getfixturevalue(request.param)
    return found


# Unconfirmed creations


@pytest.mark.parametrize("label", LABELS)
@pytest.mark.parametrize("fault", ["cut", 500, 524])
def test_it_is_found_again_whatever_its_label(
    server: VastServer | RunPodServer, tmp_path: Path, label: str, fault: str | int
) -> None:
    said: list[str] = []
    starter = on(server, tmp_path, said)
    server.relabel = LABELS[label]
    server.list_lag = 3
    if isinstance(fault, int):
        server.undo(*creation(server), status=fault)
    else:
        server.drop(*creation(server))
    assert [starter.rent()] == machines(server)
    assert starter.launch.pending == ()
    assert [(rented.id, rented.sure) for rented in starter.launch.instances] == [(machines(server)[0], True)]


@pytest.mark.parametrize("label", LABELS)
def test_it_is_followed_and_not_destroyed_where_only_its_time_and_image_speak_for_it(
    server: VastServer | RunPodServer, tmp_path: Path, label: str
) -> None:
    said: list[str] = []
    starter = on(server, tmp_path, said, terms=Terms(interruptible=isinstance(server, VastServer)))
    server.relabel, server.hide_env = LABELS[label], True
    server.drop(*creation(server))
    assert [starter.rent()] == machines(server)
    (rented,) = starter.launch.instances
    assert rented.sure == (label == "cut late")
    if isinstance(server, VastServer):
        server.outbid(70001)
        watch = Watch(starter, relaunches=0 if rented.sure else 3)
        assert watch.until_the_end() == "halted"
    assert machines(server) == [rented.id]


def test_of_several_that_it_may_be_none_is_taken_and_nothing_else_is_rented(
    runpod: RunPodServer, tmp_path: Path
) -> None:
    starter = on(runpod, tmp_path, [])
    runpod.relabel, runpod.hide_env = LABELS["dropped"], True
    runpod.drop("POST", "/v2/pods")
    when(starter, "checking whether", lambda: runpod.add_pod("theirs", name="", image=IMAGE))
    with pytest.raises(MachineError, match="pod1, theirs"):
        starter.rent()
    assert machines(runpod) == ["pod1", "theirs"]
    kept = find_launch(tmp_path / "launches", "abliterate-test", "runpod")
    assert kept is not None
    assert len(kept.launch.pending) == 1


def test_instances_of_others_are_not_taken_for_it(runpod: RunPodServer, tmp_path: Path) -> None:
    starter = on(runpod, tmp_path, [])
    runpod.add_pod("old", name="", image=IMAGE)  # there before
    runpod.fail("POST", "/v2/pods", status=500)

    def others() -> None:
        runpod.add_pod("marked", name="", image=IMAGE, env={MARKER: "abliterate-00000000-1"})
        runpod.add_pod("named", name="abliterate-00000000-1", image=IMAGE)
        runpod.add_pod("another", name="", image="registry.example.org/other:1")
        runpod.add_pod("foreign", name="notebook")

    when(starter, "checking whether", others)
    with pytest.raises(MachineError, match="no machine is offered"):
        starter.rent()
    assert starter.launch.instances == ()


def test_one_that_appears_late_is_destroyed_once_there_is_another(vast: VastServer, tmp_path: Path) -> None:
    said: list[str] = []
    starter = on(vast, tmp_path, said)
    vast.drop("PUT", "/api/v0/asks/1/")
    vast.list_lag = 10**6
    starter.look_seconds = 0.3
    assert starter.rent() == "70002"
    assert [asked.label for asked in starter.launch.pending] == ["abliterate-test-1"]
    assert starter.launch.instances[-1].id == "70002"
    vast.list_lag = 0

    when(starter, "70002: running", lambda: vast.instances.pop(70002))
    assert Watch(starter).until_the_end() == "ended"
    assert vast.instances == {}
    assert starter.launch.pending == ()
    assert [(rented.id, rented.why) for rented in starter.launch.instances] == [
        ("70001", "this launch rented two machines"),
        ("70002", "gone"),
    ]
    assert [request.path.rstrip("/").rpartition("/")[2] for request in vast.asked("DELETE")] == ["70001"]


def test_nothing_else_is_rented_while_nobody_can_tell(vast: VastServer, tmp_path: Path) -> None:
    starter = on(vast, tmp_path, [])
    vast.drop("PUT", "/api/v0/asks/1/")
    lists = vast.fail("GET", "/api/v1/instances*", status=500)
    lists.skip = 1  # the list before the creation
    with pytest.raises(MachineError, match="500"):
        starter.rent()
    assert machines(vast) == ["70001"]
    assert len(starter.launch.pending) == 1
    vast.faults.clear()
    starter.adopt()
    assert starter.launch.instances[-1].id == "70001"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_a_launch_that_is_cut_off_while_it_rents(vast: VastServer, tmp_path: Path, number: signal.Signals) -> None:
    vast.add_ask(1)
    answer_late(vast)
    terms = ["launch", "--on", "4xRTX4090", "--image", IMAGE, "--", *COMMAND]
    process = spawn(vast, tmp_path, *terms)
    wait_until(lambda: 70001 in vast.instances)
    process.send_signal(number)
    said = process.communicate(timeout=60)[1]
    assert process.returncode in (130, 143, 129, -9)
    (file,) = (tmp_path / "launches").iterdir()
    if number != signal.SIGKILL:
        assert "MAY HAVE BEEN RENTED" in said
        assert f"destroy {file.stem} --yes" in said
    command(vast, tmp_path, "destroy", file.stem, "--yes").check()
    assert vast.instances == {}


def answer_late(vast: VastServer) -> None:
    """Delay the answer to a creation until the instance is there."""
    answer = vast.answer

    def slow(call: Any, body: Any) -> Any:
        reply = answer(call, body)
        if call.method == "PUT":
            vast.closing.wait(20)
        return reply

    vast.answer = slow  # type: ignore[method-assign]


def spawn(server: VastServer | RunPodServer, tmp_path: Path, *words: Any) -> subprocess.Popen[str]:
    import os

    platform = "vast" if isinstance(server, VastServer) else "runpod"
    env = {**os.environ, **env_of(server), "ABLITERATION_LAUNCHES": str(tmp_path / "launches")}
    line = [sys.executable, "-c", "from job.cli.main import main; main()", "cloud", platform, *map(str, words)]
    return subprocess.Popen(line, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


# Watching


def test_gone_right_after_renting_is_no_end(server: VastServer | RunPodServer, tmp_path: Path) -> None:
    said: list[str] = []
    starter = on(server, tmp_path, said)
    id = starter.rent()
    server.get_lag = 8
    if isinstance(server, RunPodServer):
        server.pods[id]["status"] = "RUNNING"
    outcome: list[str] = []
    watching = threading.Thread(target=lambda: outcome.append(Watch(starter).until_the_end()))
    watching.start()
    wait_until(lambda: f"{id}: running" in "\n".join(said))
    assert f"{id}: gone" in said
    assert outcome == []
    (server.instances if isinstance(server, VastServer) else server.pods).clear()
    watching.join(20)
    assert outcome == ["ended"]


def test_gone_once_is_no_end(vast: VastServer, tmp_path: Path) -> None:
    said: list[str] = []
    starter = on(vast, tmp_path, said)
    starter.rent()

    def flicker() -> None:
        vast.get_lag = 2
        when(starter, "70001: running", vast.instances.clear)

    when(starter, "70001: running", flicker)
    assert Watch(starter).until_the_end() == "ended"
    shown = [text.partition(" (")[0] for text in said if text.startswith("70001: ")]
    assert shown == ["70001: running", "70001: gone", "70001: running", "70001: gone"]


def test_one_that_never_appears_is_told_of(vast: VastServer, tmp_path: Path) -> None:
    said: list[str] = []
    starter = on(vast, tmp_path, said)
    starter.rent()
    vast.get_lag = vast.list_lag = 10**6
    assert Watch(starter, appear_minutes=0.01).until_the_end() == "missing"
    assert any("has not appeared" in text and "BILLS" in text for text in said)
    assert vast.asked("DELETE") == []


@pytest.mark.parametrize(
    "changes",
    [
        {"actual_status": "defrosting"},
        {"actual_status": "unknown"},
        {"actual_status": None},
        {"actual_status": "exited", "cur_state": "stopped", "intended_status": None},
        {"actual_status": "exited", "cur_state": "parked"},
        {"actual_status": 7, "cur_state": [], "intended_status": {}},
    ],
)
def test_an_unknown_status_destroys_nothing(vast: VastServer, tmp_path: Path, changes: dict[str, Any]) -> None:
    said: list[str] = []
    starter = on(vast, tmp_path, said, terms=Terms(interruptible=True))
    starter.rent()
    vast.instances[70001].update(changes)
    when(starter, "MAY BILL ON", vast.instances.clear)
    watch = Watch(starter, relaunches=3, lost_minutes=0.001, start_minutes=0.001, unknown_minutes=0.005)
    assert watch.until_the_end() == "ended"
    assert vast.asked("DELETE") == []
    assert len([text for text in said if "MAY BILL ON" in text]) == 1


@pytest.mark.parametrize("changes", [{"status": "MELTED"}, {"status": None}, {"status": ""}, {}])
def test_a_pod_of_unknown_status_is_left_alone(runpod: RunPodServer, tmp_path: Path, changes: dict[str, Any]) -> None:
    starter = on(runpod, tmp_path, [])
    id = starter.rent()
    runpod.pods[id].update(changes)
    if not changes:
        del runpod.pods[id]["status"]
    when(starter, "MAY BILL ON", runpod.pods.clear)
    assert Watch(starter, relaunches=3, lost_minutes=0.001, unknown_minutes=0.005).until_the_end() == "ended"
    assert runpod.asked("DELETE") == []


def test_an_outbid_that_was_an_old_answer_destroys_nothing(vast: VastServer, tmp_path: Path) -> None:
    starter = on(vast, tmp_path, [], terms=Terms(interruptible=True))
    starter.rent()
    vast.outbid(70001)
    looks: list[int] = []
    answer = vast.answer

    def flicker(call: Any, body: Any) -> Any:
        if call.method == "GET" and call.path.startswith("/api/v0/instances/"):
            looks.append(1)
            if len(looks) == 2:
                vast.instances[70001].update(actual_status="running", cur_state="running")
            if len(looks) == 6:
                vast.instances.clear()
        return answer(call, body)

    vast.answer = flicker  # type: ignore[method-assign]
    assert Watch(starter, relaunches=3).until_the_end() == "ended"
    assert vast.asked("DELETE") == []
    assert len(vast.asked("PUT")) == 1


def test_what_never_started_is_destroyed_even_without_a_checkpoint(vast: VastServer, tmp_path: Path) -> None:
    said: list[str] = []
    starter = on(vast, tmp_path, said, command=("run", "model"))
    starter.rent()
    vast.instances[70001].update(actual_status="loading", status_msg="Error response from daemon: manifest unknown")
    assert Watch(starter, relaunches=0, start_minutes=0.003).until_the_end() == "halted"
    assert vast.instances == {}
    assert any("manifest unknown" in text for text in said)
    assert starter.launch.left == ()


def test_what_has_run_is_not_destroyed_without_a_checkpoint(vast: VastServer, tmp_path: Path) -> None:
    said: list[str] = []
    starter = on(vast, tmp_path, said, command=("run", "model", "--checkpoint", "file:///data/state"))
    starter.rent()

    when(starter, "70001: running", lambda: vast.instances[70001].update(actual_status="rebooting"))
    assert Watch(starter, relaunches=3, start_minutes=0.003).until_the_end() == "halted"
    assert machines(vast) == ["70001"]
    assert any("no --checkpoint off the machine" in text for text in said)


def test_a_watch_that_was_cut_off_while_it_replaced_goes_on_with_that(vast: VastServer, tmp_path: Path) -> None:
    starter = on(vast, tmp_path, [], terms=Terms(interruptible=True))
    starter.rent()
    vast.outbid(70001)
    vast.fail("DELETE", status=500)
    watching = spawn(vast, tmp_path, "watch", "abliterate-test", "--every", "0.05")
    wait_until(lambda: bool(vast.asked("DELETE")))
    watching.send_signal(signal.SIGINT)
    said = watching.communicate(timeout=60)[1]
    assert watching.returncode == 130
    assert "70001 MAY BILL ON" in said.splitlines()[-1]
    vast.faults.clear()
    again = spawn(vast, tmp_path, "watch", "abliterate-test", "--every", "0.05")
    wait_until(lambda: 70002 in vast.instances)
    assert 70001 not in vast.instances
    time.sleep(0.5)
    vast.instances.clear()
    said = again.communicate(timeout=60)[1]
    assert again.returncode == 0, said


def test_a_watch_that_fails_names_what_bills_on(vast: VastServer, tmp_path: Path) -> None:
    on(vast, tmp_path, []).rent()
    result = command(vast, tmp_path, "watch", "abliterate-test", "--every", "0.05", VAST_API_KEY="revoked-key-12345")
    assert result.code == 2
    vast.fail("GET", "/api/v0/instances/*", status=400)
    result = command(vast, tmp_path, "watch", "abliterate-test", "--every", "0.05")
    assert "70001 MAY BILL ON" in result.err
    assert "cloud vast destroy abliterate-test --yes" in result.err


# Destroying


@pytest.mark.parametrize("fault", ["500", "cut", "after the deed", "lingers", "unknown at first"])
def test_destroying_goes_on_until_it_is_gone(server: VastServer | RunPodServer, tmp_path: Path, fault: str) -> None:
    said: list[str] = []
    starter = on(server, tmp_path, said)
    id = starter.rent()
    if fault == "500":
        server.fail("DELETE", status=500, times=13)
    elif fault == "cut":
        server.drop("DELETE", times=1)
    elif fault == "after the deed":
        server.undo("DELETE", times=1)
    if fault in ("cut", "after the deed"):  # then 404 means done: the platform has shown it
        starter.destroyer.saw(id)
    if fault == "lingers":
        server.linger = 6
    elif fault == "unknown at first":
        server.get_lag = 6
    starter.destroyer.destroy([id])
    assert machines(server) == []
    assert starter.launch.left == ()
    assert f"destroyed instance {id}: destroyed by hand" in said
    if fault in ("500", "lingers"):
        assert any(f"{id} COULD NOT BE DESTROYED and BILLS ON" in text for text in said)


def test_destroying_of_a_label_destroys_all_of_it(vast: VastServer, tmp_path: Path) -> None:
    starter = on(vast, tmp_path, [])
    starter.rent()
    first, *_ = starter.launch.instances
    starter.rent()  # as an older version left them
    vast.add_instance(9, label="abliterate-test-3")
    vast.add_instance(10, label="somebody else's")
    command(vast, tmp_path, "destroy", "abliterate-test", "--yes", "--every", "0.05").check()
    assert machines(vast) == ["10"]
    assert first.id == "70001"


def test_destroying_of_a_label_that_is_not_recorded_here(server: VastServer | RunPodServer, tmp_path: Path) -> None:
    command(server, tmp_path, "destroy", "abliterate-0123abcd", "--yes").fails(
        2, "abliterate-0123abcd is neither a launch"
    )
    if isinstance(server, VastServer):
        server.add_instance(5, label="abliterate-0123abcd-1")
        server.add_instance(6, label="", extra_env=[[MARKER, "abliterate-0123abcd-2"]])
        server.add_instance(7, label="abliterate-0123abcd1-1")
    else:
        server.add_pod("5", name="abliterate-0123abcd-1")
        server.add_pod("6", name="", env={MARKER: "abliterate-0123abcd-2"})
        server.add_pod("7", name="abliterate-0123abcd1-1")
    command(server, tmp_path, "destroy", "abliterate-0123abcd", "--yes", "--every", "0.05").check()
    assert machines(server) == ["7"]


def test_destroying_ends_with_a_line_where_it_is_cut_off(vast: VastServer, tmp_path: Path) -> None:
    vast.add_instance(9)
    vast.fail("DELETE", status=500)
    process = spawn(vast, tmp_path, "destroy", "9", "--yes", "--every", "0.05")
    wait_until(lambda: bool(vast.asked("DELETE")))
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert "MAY BILL ON: 9; end it at https://console.vast.ai" in said.splitlines()[-1]


def test_no_such_instance_is_believed_after_a_while(vast: VastServer, monkeypatch: pytest.MonkeyPatch) -> None:
    from job.cloud.credentials import open_market
    from tests.fakes.cloud.helpers import QUICK

    said: list[str] = []
    market = open_market("vast", said.append, env=env_of(vast), patience=QUICK)
    young = Termination(market, "5", said.append, rented=time.time(), pause=0.05, longest=0.05)
    assert not young.insist(0.3)
    assert any("does not list instance 5 yet" in text for text in said)
    monkeypatch.setattr(ending, "APPEAR_SECONDS", 0.1)
    assert young.insist(5.0)
    assert Termination(market, "5", said.append).press()
