"""The rented machine in a job: preflight's checks, and the end of the rental exactly when it is due."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from job.mirror.options import PACE
from tests.fakes.cloud import KEY, RunPodServer, VastServer
from tests.finished_job import finished_job
from tests.helpers import abliterate, job_arguments, only_job, start


@pytest.fixture
def vast() -> Iterator[VastServer]:
    with VastServer() as server:
        server.add_instance(12345, dph_total=3.6)
        yield server


def rented(server: VastServer, **others: str) -> dict[str, str]:
    return {"CONTAINER_ID": "12345", "CONTAINER_API_KEY": KEY, "VAST_URL": server.url, **others}


def checks(*arguments: Any, **env: str) -> tuple[int, dict[str, dict[str, Any]]]:
    result = abliterate("preflight", *arguments, "--json", **env)
    return result.code, {one["name"]: one for one in json.loads(result.out)["checks"]}


@pytest.fixture
def job(random_model_folder: Path, tmp_path: Path) -> list[Any]:
    options: list[Any] = [random_model_folder, "--workspace", tmp_path / "runs"]
    for option in ("good-prompts", "bad-prompts", "good-eval-prompts", "bad-eval-prompts"):
        file = tmp_path / f"{option}.txt"
        known = "famous" if "bad" in option else "quiet"  # to the model's tokenizer, which knows few words
        file.write_text("".join(f"Where is the {known} {option} kettle number {i}?\n" for i in range(30)))
        options += [f"--{option}", file]
    return options


def test_preflight_says_what_will_not_survive_a_destroyed_machine(
    job: list[Any], vast: VastServer, tmp_path: Path
) -> None:
    code, found = checks(*job, "--when-done", "destroy", "--upload", (tmp_path / "out").as_uri(), **rented(vast))
    assert code == 3
    assert found["rental.survival"]["status"] == "fail"
    assert "the result" in found["rental.survival"]["measured"]
    assert "--checkpoint" in found["rental.survival"]["measured"]
    assert (found["rental.end"]["status"], found["rental.checkpoint"]["status"]) == ("ok", "warn")
    assert "everything is lost" in found["rental.checkpoint"]["measured"]
    # The cost uses the platform's own price.
    assert "at $3.60 an hour" in found["estimate.cost"]["measured"]
    code, found = checks(*job, "--when-done", "stop", "--price", "1", **rented(vast))
    assert (code, "rental.survival" in found) == (0, False)
    assert "at $1.00 an hour" in found["estimate.cost"]["measured"]


def test_preflight_says_which_other_job_keeps_the_machine(job: list[Any], vast: VastServer, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    asked = (*job, "--when-done", "stop")
    assert "rental.others" not in checks(*asked, **rented(vast))[1]
    other = finished_job(runs, None, None, state="running")
    code, found = checks(*asked, **rented(vast))
    said = found["rental.others"]
    assert (code, said["status"]) == (0, "warn")  # no reason not to start
    assert (
        f"job {other.folder.path.name} in {runs} is not delivered: this machine will NOT be ended" in said["measured"]
    )
    assert "abliterate resume --job" in said["remedy"]
    assert "--workspace" in said["remedy"]
    # Without an action at the end no warning is needed; nor if the other job is delivered.
    assert "rental.others" not in checks(*asked[:-2], **rented(vast))[1]
    finished_job(tmp_path / "delivered", None, (tmp_path / "out").as_uri())
    delivered = (*job, "--workspace", tmp_path / "delivered", "--when-done", "stop")
    assert "rental.others" not in checks(*delivered, **rented(vast))[1]


def test_a_key_that_cannot_read_the_instance_and_a_machine_that_is_no_rental(job: list[Any], vast: VastServer) -> None:
    code, found = checks(*job, "--when-done", "stop", **rented(vast, CONTAINER_API_KEY="another-key-0123456789"))
    assert (code, found["rental.end"]["status"]) == (76, "fail")
    assert "another-key" not in json.dumps(found)
    code, found = checks(*job, "--when-failed", "stop")
    assert (code, found["rental.end"]["status"]) == (76, "fail")
    assert "not a known rental" in found["rental.end"]["measured"]
    code, found = checks(*job)
    assert (code, any(name.startswith("rental") for name in found)) == (0, False)


@pytest.mark.slow
def test_the_machine_is_ended_once_all_is_delivered_and_not_before(
    organism: Path, finished: Path, vast: VastServer, tmp_path: Path
) -> None:
    workspace = tmp_path / "runs"
    shutil.copytree(finished, workspace, symlinks=True)
    arguments = ["run", *job_arguments(organism), "--workspace", workspace, "--trials", 20, "--when-done", "stop"]
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.txt").write_text("years of work")
    target = ("--upload", (tmp_path / "taken").as_uri())
    # A failed delivery is not done. On request, a failed job ends the machine as well.
    abliterate(*arguments, *target, **rented(vast)).fails(6, "holds something else")
    assert vast.asked("PUT") == vast.asked("DELETE") == []
    (tmp_path / "taken" / "thesis.txt").unlink()
    told = abliterate(*arguments, *target, **rented(vast)).check()
    assert "stop instance 12345" in told.err
    assert len(vast.asked("PUT", "12345")) == 1
    assert (tmp_path / "taken" / "model.safetensors").exists()
    # Restarted from outside: it is finished, and does not stop the machine in a loop.
    told = abliterate(*arguments, *target, **rented(vast)).check()
    assert "nothing to do" in told.err
    assert "BILLS ON" in told.err
    assert len(vast.asked("PUT", "12345")) == 1
    # A start that makes a delivery has made progress: it stops the machine again, once.
    more = (*target, "--upload", (tmp_path / "second").as_uri())
    for _ in range(2):
        abliterate(*arguments, *more, **rented(vast)).check()
        assert len(vast.asked("PUT", "12345")) == 2
    # So does one that continues the search.
    arguments[arguments.index(20)] = 24
    for _ in range(2):
        abliterate(*arguments, *more, **rented(vast)).check()
        assert len(vast.asked("PUT", "12345")) == 3
    assert KEY not in "".join(path.read_text(errors="replace") for path in workspace.rglob("*") if path.is_file())


@pytest.mark.slow
def test_a_failed_job_ends_the_machine_only_as_when_failed_says(
    organism: Path, vast: VastServer, tmp_path: Path
) -> None:
    arguments = ["run", *job_arguments(organism), "--workspace", tmp_path / "runs", "--trials", 4]
    vast.add_instance(777)
    gone = [*arguments, "--when-failed", "stop"]
    gone[1] = str(tmp_path / "no-model")
    abliterate(*gone, **rented(vast, CONTAINER_ID="777")).fails(3, "there is no model folder")
    assert len(vast.asked("PUT", "777")) == 1
    fault = ("--set", 'scoring.refusal_markers=["never said"]')
    abliterate(*arguments, *fault, "--when-done", "stop", process=True, **rented(vast)).fails(3, "nothing to remove")
    assert vast.asked("PUT", "12345") == []
    abliterate(*arguments, *fault, "--when-failed", "stop", **rented(vast)).fails(3, "nothing to remove")
    assert len(vast.asked("PUT", "12345")) == 1


@pytest.mark.slow
def test_held_on_this_machine_ends_nothing_and_held_elsewhere_ends_the_one_that_came_back(
    organism: Path, vast: VastServer, tmp_path: Path
) -> None:
    mirror = (tmp_path / "mirror").as_uri()
    arguments = ["run", *job_arguments(organism), "--trials", 400, "--checkpoint", mirror, "--when-done", "destroy"]
    arguments += ["--allow", "rental.survival"]
    process = start(*arguments, "--workspace", tmp_path / "one", **rented(vast))
    try:
        while not list((tmp_path / "mirror").glob("*/head.json")):
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.02)
        # The same machine: ending it would end the other run.
        abliterate(*arguments, "--workspace", tmp_path / "two", **rented(vast)).fails(4, "is held by")
        assert vast.asked("DELETE") == []
    finally:
        process.kill()
        process.communicate()
    # Another machine holds it: it has another boot id and sends heartbeats.
    (head,) = (tmp_path / "mirror").glob("*/head.json")
    text = json.loads(head.read_text())
    text["lease"]["process"]["boot_id"] = "another-boot"
    head.write_text(json.dumps(text))
    # It looks for a sign of life more often than by default.
    process = start(*arguments, "--workspace", tmp_path / "three", **rented(vast), **{PACE: "20,120,1,0.2"})
    while process.poll() is None:
        text["lease"]["beat"] += 1
        head.with_name("head.tmp").write_text(json.dumps(text))
        head.with_name("head.tmp").replace(head)
        try:
            process.wait(0.1)
        except Exception:  # it is still checking
            continue
    err = process.communicate()[1]
    assert process.returncode == 4, err
    assert len(vast.asked("DELETE", "12345")) == 1


@pytest.mark.slow
def test_a_pod_is_destroyed_after_the_delivery(organism: Path, finished: Path, tmp_path: Path) -> None:
    workspace = tmp_path / "runs"
    shutil.copytree(finished, workspace, symlinks=True)
    with RunPodServer() as runpod:
        runpod.add_pod("abc123")
        env = {"RUNPOD_POD_ID": "abc123", "RUNPOD_API_KEY": KEY, "RUNPOD_API_BASE_URL": runpod.url}
        arguments = ["run", *job_arguments(organism), "--workspace", workspace, "--trials", 20]
        target = ("--upload", (tmp_path / "out").as_uri(), "--when-done", "destroy")
        # Only the delivery is left, so nothing was checked before: all is on this machine.
        told = abliterate(*arguments, *target, **env).check()
        assert "destroy was requested" in told.err
        assert (len(runpod.asked("DELETE")), len(runpod.asked("POST", "abc123"))) == (0, 1)
        # The user vouches for places that survive it.
        places = ("--checkpoint", (tmp_path / "mirror").as_uri(), "--allow", "rental.survival")
        abliterate(*arguments, *target, *places, "--upload", (tmp_path / "two").as_uri(), **env).check()
        assert len(runpod.asked("DELETE", "abc123")) == 1
    assert only_job(workspace).is_dir()
