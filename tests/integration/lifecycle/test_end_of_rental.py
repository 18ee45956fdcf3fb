"""Ends of rentals: the whole policy, the proofs before a destroy, and the calls that reach the platform."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import psutil
import pytest

from job.cloud.end_policy import AskedEnds, Ended, ending
from job.cloud.self_stop import find_rental
from job.lifecycle.end_of_rental import Machine, Progress, end_rental
from job.lifecycle.safekeeping import VOUCHED
from job.lifecycle.supervisor import asked_when_failed
from job.preflight.mounts import OFF_MACHINE, Mount, is_off_machine, outlives_machine, parse_mountinfo
from job.records import State
from job.storage.atomic import write_record
from job.storage.jobs import job_settings
from job.storage.run_folder import RunFolder
from tests.ends_of_rentals import SITUATIONS, WAYS, asked_for, cases, page
from tests.fakes.cloud import KEY, VastServer
from tests.finished_job import FinishedJob, finished_job
from tests.helpers import UNMEASURED, Result, abliterate, environment, start, wait_until

# --- the policy ----------------------------------------------------------------------------------------------------

# The result of a request to destroy, by the kind of end and the situation, in the order of SITUATIONS.
TO_THE_END = ("destroy", "stop", "stop", "nothing", "nothing")
STOP_AT_MOST = ("stop", "stop", "stop", "nothing", "nothing")
TAKEN_OVER = ("destroy", "stop", "stop", "nothing", "destroy")
NEVER = ("nothing",) * 5
EXPECTED = {
    "0: delivered": ("done", TO_THE_END),
    "0: the job was found finished": ("done", TO_THE_END),
    "0: only the delivery was left": ("done", TO_THE_END),
    "1: unexpected error": ("failed", TO_THE_END),
    "2: bad usage or settings, unknown variable, empty checkpoint": ("failed", STOP_AT_MOST),
    "3: preflight: impossible job": ("failed", STOP_AT_MOST),
    "4: held by another process on this machine": ("failed", NEVER),
    "4: held by another machine": ("done", TAKEN_OVER),
    "5: a gate was missed": ("failed", TO_THE_END),
    "6: a delivery failed for good": ("failed", TO_THE_END),
    "75: stopped by a signal": ("failed", NEVER),
    "75: the watchdog ended a hung forward": ("failed", TO_THE_END),
    "76: preflight: not on this machine": ("failed", STOP_AT_MOST),
    "another exit code": ("failed", TO_THE_END),
    "killed: out of memory, or `kill -9`": ("failed", TO_THE_END),
    "killed: segmentation fault": ("failed", TO_THE_END),
    "killed: abort, bus error": ("failed", TO_THE_END),
    "killed: stop signal before it was handled": ("failed", NEVER),
    "killed after a stop signal": ("failed", NEVER),
}


@pytest.mark.parametrize("way", WAYS)
def test_every_end_is_decided(way: str) -> None:
    assert EXPECTED.keys() == WAYS.keys()
    option, destroying = EXPECTED[way]
    for _, done, failed, situation in (case for case in cases() if case[0] == way):
        asked = done if option == "done" else failed
        both = AskedEnds(asked_for(done).when_done, asked_for(failed).when_failed)
        decision = ending(WAYS[way], both, SITUATIONS[situation])
        most = destroying[list(SITUATIONS).index(situation)]
        expected = "nothing" if asked == "nothing" or most == "nothing" else "stop" if asked == "stop" else most
        assert decision.action == expected, (way, done, failed, situation)
        assert decision.reason or decision.action == asked


def test_the_table_of_all_ends_is_up_to_date() -> None:
    """`python -m tests.ends_of_rentals --write docs/ends-of-rentals.md` makes it so."""
    assert (Path(__file__).parents[3] / "docs/ends-of-rentals.md").read_text() == page()


# --- places off the machine ----------------------------------------------------------------------------------------

SERVED = {
    **dict.fromkeys(OFF_MACHINE, "server:/export"),
    "cifs": "//server/share",
    "smb3": "//server/share",
    "lustre": "10.0.0.2@tcp:/scratch",
    "ceph": "10.0.0.2:6789:/",
    "fuse.sshfs": "me@server:/home/me",
    "fuse.mfs": "mfs#eu.example.org:9421",
}


@pytest.mark.parametrize("kind", sorted(OFF_MACHINE))
def test_listed_file_systems_are_off_the_machine_unless_it_serves_them_itself(kind: str) -> None:
    assert is_off_machine(Mount(point="/mnt", kind=kind, source=SERVED[kind], device="0:1"))
    for here in ("localhost:/export", "//127.0.0.1/share", "me@localhost:/x", "mfs#127.0.0.1:9421", "[::1]:/export"):
        assert not is_off_machine(Mount(point="/mnt", kind=kind, source=here, device="0:1"))


def test_a_place_that_cannot_be_looked_at_outlives_nothing(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    assert not outlives_machine((tmp_path / "loop").as_uri())
    assert not outlives_machine(tmp_path.as_uri())
    assert outlives_machine("s3://bucket/prefix")


@pytest.mark.parametrize(
    ("kind", "source"),
    [
        ("ext4", "/dev/sda1"), ("xfs", "/dev/nvme0n1"), ("btrfs", "/dev/sdb"), ("zfs", "tank/data"), ("ext3", "/dev/a"),
        ("overlay", "overlay"), ("aufs", "none"), ("fuse.fuse-overlayfs", "fuse-overlayfs"), ("tmpfs", "tmpfs"),
        ("ramfs", "ramfs"), ("devtmpfs", "udev"), ("9p", "hostshare"), ("virtiofs", "workspace"), ("vboxsf", "shared"),
        ("fuse.rclone", "remote:bucket"), ("fuse", "rclone"), ("fuse", "something"), ("fuse.unknown", "server:/x"),
        ("fuse.juicefs", "JuiceFS:data"), ("fuse.goofys", "bucket"), ("fuse.geesefs", "bucket"), ("fuseblk", "a"),
        ("fuse.hf-mount", "me/repo"), ("ocfs2", "/dev/sdd"), ("gfs2", "/dev/sde"), ("squashfs", "/dev/loop0"),
        ("unknown", "unknown"), ("nfsd", "nfsd"), ("fuse.nfs", "server:/x"), ("", ""),
    ],
)  # fmt: skip
def test_all_other_file_systems_count_as_on_the_machine(kind: str, source: str) -> None:
    assert not is_off_machine(Mount(point="/mnt", kind=kind, source=source, device="0:1"))


def test_network_volumes_of_platforms_are_known_by_what_they_mount() -> None:
    table = (
        "40 1 0:50 / /workspace rw - fuse mfs#us-1.example.org:9421 rw\n"
        "41 1 0:51 / /bucket rw - fuse mountpoint-s3 rw\n"
        "42 1 0:52 / /home rw - nfs4 10.1.2.3:/home rw,vers=4.2\n"
        "43 1 0:53 / /host rw - virtiofs host rw\n"
    )
    assert [is_off_machine(mount) for mount in parse_mountinfo(table)] == [True, True, True, False]


# --- proofs before a destroy ----------------------------------------------------------------------------------------


@pytest.fixture
def vast() -> Iterator[VastServer]:
    with VastServer() as server:
        server.add_instance(12345)
        yield server


def rented(server: VastServer, **others: str) -> dict[str, str]:
    return {"CONTAINER_ID": "12345", "CONTAINER_API_KEY": KEY, "VAST_URL": server.url, **others}


def calls(server: VastServer) -> list[str]:
    """Return the calls to the platform that end an instance."""
    return [request.method for request in server.requests if request.method in ("DELETE", "PUT")]


@pytest.fixture
def job(tmp_path: Path) -> FinishedJob:
    """Return a finished job whose places the user vouches for: no file system here is another machine's."""
    places = (tmp_path / "mirror").as_uri(), (tmp_path / "out").as_uri()
    return finished_job(tmp_path / "runs", *places, allow=[VOUCHED])


def end(
    job: FinishedJob, server: VastServer, monkeypatch: pytest.MonkeyPatch, *, code: int = 0, action: str = "destroy"
) -> tuple[list[str], str]:
    """End the rental after a start of a job in this process; return the platform calls and the messages."""
    for name, value in rented(server).items():
        monkeypatch.setenv(name, value)
    before = len(calls(server))
    said: list[str] = []
    machine = Machine(job.workspace, job.folder, job_settings(job.folder))
    end_rental(Ended(code), asked_for(action), machine, said.append)
    return calls(server)[before:], "\n".join(said)


def test_a_job_that_is_found_elsewhere_is_destroyed(
    job: FinishedJob, vast: VastServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, said = end(job, vast, monkeypatch)
    assert found == ["DELETE"], said


def damage(job: FinishedJob, kind: str, tmp_path: Path) -> str:
    """Remove one thing that must survive, and return a part of the expected message."""
    mirror, out = tmp_path / "mirror" / job.folder.path.name, tmp_path / "out"
    objects = sorted((mirror / "objects").iterdir())
    head = json.loads((mirror / "head.json").read_text())
    if kind == "mirror gone":
        mirror.rename(tmp_path / "elsewhere")
        return "does not hold job"
    if kind == "head torn":
        (mirror / "head.json").write_bytes((mirror / "head.json").read_bytes()[:200])
        return "is inconsistent"
    if kind == "object missing":
        objects[0].unlink()
        return "missing"
    if kind == "object damaged":
        data = bytearray(objects[-1].read_bytes() or b" ")
        data[0] ^= 1
        objects[-1].write_bytes(data)
        return "not match their hash"
    if kind == "snapshot empty":
        (mirror / "head.json").write_text(json.dumps({**head, "files": {}}))
        return "no snapshot"
    if kind == "target gone":
        out.rename(tmp_path / "moved")
        return "there is no manifest.json"
    if kind == "weights missing":
        (out / "model.safetensors").unlink()
        return "model.safetensors is missing"
    if kind == "weights damaged":
        data = bytearray((out / "model.safetensors").read_bytes())
        data[1000] ^= 1
        (out / "model.safetensors").write_bytes(data)
        return "not what was delivered"
    if kind == "weights cut":
        (out / "model.safetensors").write_bytes((out / "model.safetensors").read_bytes()[:-1])
        return "not what was delivered"
    assert kind == "another export"
    text = (out / "manifest.json").read_text()
    (out / "manifest.json").write_text(text.replace("config.json", "konfig.json"))
    return "another export"


@pytest.mark.parametrize(
    "kind",
    ["mirror gone", "head torn", "object missing", "object damaged", "snapshot empty", "target gone",
     "weights missing", "weights damaged", "weights cut", "another export"],
)  # fmt: skip
def test_what_is_not_found_elsewhere_now_is_not_destroyed(
    job: FinishedJob, vast: VastServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    said_of_it = damage(job, kind, tmp_path)
    found, said = end(job, vast, monkeypatch)
    assert found == ["PUT"], said
    assert vast.instances[12345]["intended_status"] == "stopped"
    assert "destroy was requested" in said
    assert said_of_it in said


@pytest.mark.parametrize("change", ["report", "event", "trial"])
def test_a_checkpoint_that_is_behind_is_brought_up_to_date_first(
    job: FinishedJob, vast: VastServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    if change == "report":
        job.folder.report_file.write_text("# a later report\n")
    elif change == "event":
        with job.folder.events_file.open("a") as file:
            file.write('{"event": "job_failed"}\n')
    else:
        with closing(sqlite3.connect(job.folder.study_file)) as db, db:
            db.execute("INSERT INTO trials VALUES (3, 'COMPLETE')")
    found, said = end(job, vast, monkeypatch)
    assert found == ["DELETE"], said
    # Data that was only here is mirrored now.
    head = json.loads((tmp_path / "mirror" / job.folder.path.name / "head.json").read_text())
    assert head["generation"] == 2
    assert head["lease"]["released"]


def test_a_checkpoint_that_cannot_be_written_any_more_is_no_reason_to_lose_the_latest(
    job: FinishedJob, vast: VastServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job.folder.report_file.write_text("# a later report\n")
    objects = tmp_path / "mirror" / job.folder.path.name / "objects"
    objects.rename(objects.with_name("kept"))
    objects.write_text("in the way")
    found, said = end(job, vast, monkeypatch)
    assert found == ["PUT"], said
    assert "destroy was requested" in said


def test_places_on_this_machine_do_not_count_unless_somebody_vouches_for_them(
    tmp_path: Path, vast: VastServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    places = (tmp_path / "mirror").as_uri(), (tmp_path / "out").as_uri()
    found, said = end(finished_job(tmp_path / "runs", *places), vast, monkeypatch)
    assert found == ["PUT"], said
    assert "which is on it" in said


def test_a_job_without_a_checkpoint_or_a_delivery_is_not_destroyed(
    tmp_path: Path, vast: VastServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = finished_job(tmp_path / "one", None, (tmp_path / "out").as_uri(), allow=[VOUCHED])
    found, said = end(out, vast, monkeypatch)
    assert found == ["PUT"], said
    assert "nowhere else" in said
    mirrored = finished_job(tmp_path / "two", (tmp_path / "mirror").as_uri(), None, allow=[VOUCHED])
    Progress(mirrored.workspace, mirrored.folder)("trial", {})
    found, said = end(mirrored, vast, monkeypatch)
    assert found == ["PUT"], said
    assert "not delivered off this machine" in said


@pytest.mark.parametrize("code", [1, 5, 6, -signal.SIGKILL])
def test_a_failed_job_is_destroyed_only_with_its_export_delivered(
    tmp_path: Path, vast: VastServer, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    mirror = (tmp_path / "mirror").as_uri()
    failed = finished_job(tmp_path / "runs", mirror, None, state="failed", allow=[VOUCHED])
    assert end(failed, vast, monkeypatch, code=code)[0] == ["PUT"]
    # Without an export the mirror holds everything.
    (failed.export / ".done").unlink()
    assert end(failed, vast, monkeypatch, code=code)[0] == ["DELETE"]


@pytest.mark.parametrize("code", [2, 3, 76])
@pytest.mark.parametrize("action", ["stop", "destroy"])
def test_a_refused_start_stops_at_most(
    job: FinishedJob, vast: VastServer, monkeypatch: pytest.MonkeyPatch, code: int, action: str
) -> None:
    assert end(job, vast, monkeypatch, code=code, action=action)[0] == ["PUT"]


@pytest.mark.parametrize("action", ["stop", "destroy"])
@pytest.mark.parametrize("code", [0, 1, -signal.SIGKILL])
def test_another_job_that_is_not_delivered_keeps_the_machine(
    job: FinishedJob, vast: VastServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, action: str
) -> None:
    other = finished_job(job.workspace, None, None, seed=8, state="running")
    found, said = end(job, vast, monkeypatch, code=code, action=action)
    assert found == [], said
    assert f"job {other.folder.path.name} in {job.workspace} is not delivered" in said
    assert "BILLS ON" in said
    # Finished without a target: the only copy of its result is here.
    write_record(other.folder.state_file, State(state="finished", trials=3, chosen=1))
    assert end(job, vast, monkeypatch, code=code, action=action)[0] == []
    # Torn: its state is unknown.
    other.folder.job_file.write_text("{")
    assert end(job, vast, monkeypatch, code=code, action=action)[0] == []


def test_another_job_that_is_delivered_must_survive_as_well(
    job: FinishedJob, vast: VastServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    places = (tmp_path / "mirror").as_uri(), (tmp_path / "out-2").as_uri()
    finished_job(job.workspace, *places, seed=8, allow=[VOUCHED])
    (tmp_path / "out-2" / "model.safetensors").unlink()
    found, said = end(job, vast, monkeypatch)
    assert found == ["PUT"], said
    assert "out-2" in said


def test_a_job_that_somebody_else_is_at_keeps_the_machine(
    job: FinishedJob, vast: VastServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = "import sys, time; from pathlib import Path; from job.storage.run_folder import RunFolder\n\
with RunFolder(Path(sys.argv[1])).held(): print(flush=True); time.sleep(600)"
    holder = subprocess.Popen([sys.executable, "-c", code, job.folder.path], stdout=subprocess.PIPE)
    assert holder.stdout is not None
    holder.stdout.readline()
    found, said = end(job, vast, monkeypatch)
    holder.kill()
    holder.wait()
    holder.stdout.close()
    assert found == [], said
    assert "another process on this machine holds" in said
    # Or on another machine, by its lease.
    file = tmp_path / "mirror" / job.folder.path.name / "head.json"
    head = json.loads(file.read_text())
    head["lease"] |= {"released": False, "process": {**head["lease"]["process"], "boot_id": "another"}}
    file.write_text(json.dumps(head))
    found, said = end(job, vast, monkeypatch)
    assert found == [], said
    assert "is held by" in said


def test_a_machine_that_was_overtaken_is_destroyed_once_the_others_have_its_trials(
    job: FinishedJob, vast: VastServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in rented(vast).items():
        monkeypatch.setenv(name, value)
    machine = Machine(job.workspace, job.folder, job_settings(job.folder))
    with closing(sqlite3.connect(job.folder.study_file)) as db, db:
        db.execute("INSERT INTO trials VALUES (3, 'COMPLETE')")
    said: list[str] = []
    end_rental(Ended(4, elsewhere=True), asked_for("destroy"), machine, said.append)
    assert calls(vast) == ["PUT"]
    assert "3 trials, this machine has 4" in "\n".join(said)
    with closing(sqlite3.connect(job.folder.study_file)) as db, db:
        db.execute("DELETE FROM trials WHERE number = 3")
    end_rental(Ended(4, elsewhere=True), asked_for("destroy"), machine, said.append)
    assert calls(vast) == ["PUT", "DELETE"]


def test_this_machine_holding_the_job_ends_nothing(
    job: FinishedJob, vast: VastServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert end(job, vast, monkeypatch, code=4)[0] == []


# --- a second end, and messages --------------------------------------------------------------------------------------


def test_a_stop_is_made_again_after_new_work_and_only_then(
    job: FinishedJob, vast: VastServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped() -> int:
        end(job, vast, monkeypatch, action="stop")
        return len(calls(vast))

    assert [stopped(), stopped()] == [1, 1]
    progress = Progress(job.workspace, job.folder)
    uploads = job.folder.read_uploads()
    idle: list[tuple[str, dict[str, Any]]] = [
        ("job_started", {}),
        ("preflight", {}),
        ("delivery", uploads[0].model_dump()),  # was delivered before
        ("delivery", {**uploads[0].model_dump(), "target": "file:///new", "state": "failed"}),
    ]
    for event, fields in idle:
        progress(event, fields)
    assert stopped() == 1
    new: list[tuple[str, dict[str, Any]]] = [
        ("trial", {"number": 3}),
        ("exported", {"export": "trial-0003"}),
        ("delivery", {**uploads[0].model_dump(), "target": "file:///new"}),
    ]
    for count, (event, fields) in enumerate(new, 2):
        progress = Progress(job.workspace, job.folder)
        progress("job_started", {})
        progress(event, fields)
        assert [stopped(), stopped()] == [count, count]


def test_nothing_that_fails_to_be_said_keeps_a_rental(
    job: FinishedJob, vast: VastServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in rented(vast).items():
        monkeypatch.setenv(name, value)

    def broken(_: str) -> None:
        raise OSError(5, "Input/output error")

    rental = find_rental()
    assert rental is not None
    assert rental.end("stop", job.workspace, broken).state == "taken"
    machine = Machine(job.workspace, job.folder, job_settings(job.folder))
    end_rental(Ended(0), asked_for("destroy"), machine, broken)
    assert calls(vast) == ["PUT", "DELETE"]


# --- for real -------------------------------------------------------------------------------------------------------


def resume(job: FinishedJob, server: VastServer, *arguments: str, **env: str) -> Result:
    return abliterate("resume", "--workspace", job.workspace, *arguments, **rented(server, **env))


def test_a_finished_job_whose_mirror_is_gone_is_stopped_and_not_destroyed(
    job: FinishedJob, vast: VastServer, tmp_path: Path
) -> None:
    """Regression: sent DELETE."""
    (tmp_path / "mirror").rename(tmp_path / "gone")
    told = resume(job, vast, "--set", 'when_done="destroy"').check()
    assert "nothing to do" in told.err
    assert calls(vast) == ["PUT"], told.err


def test_a_finished_job_beside_an_undelivered_one_ends_nothing(
    job: FinishedJob, vast: VastServer, tmp_path: Path
) -> None:
    """Regression: sent DELETE."""
    finished_job(job.workspace, None, None, seed=8, state="running")
    told = resume(job, vast, "--job", job.folder.path.name, "--set", 'when_done="destroy"').check()
    assert calls(vast) == [], told.err
    assert "BILLS ON" in told.err


def test_ends_do_not_travel_with_a_job(tmp_path: Path, vast: VastServer) -> None:
    """Regression: sent DELETE, by another machine's settings."""
    places = (tmp_path / "mirror").as_uri(), (tmp_path / "out").as_uri()
    asked = {"when_done": "destroy", "when_failed": "destroy", "allow": [VOUCHED]}
    job = finished_job(tmp_path / "runs", *places, **asked)
    resume(job, vast).check()
    assert calls(vast) == []
    resume(job, vast, ABLITERATE_WHEN_DONE="stop").check()
    assert calls(vast) == ["PUT"]
    resume(job, vast, "--when-done", "destroy", ABLITERATE_WHEN_DONE="stop").check()
    assert calls(vast) == ["PUT", "DELETE"]
    # --set counts last, here as everywhere.
    before = len(calls(vast))
    words = ("--set", 'when_done="nothing"', "--when-done", "destroy")
    resume(job, vast, *words, ABLITERATE_WHEN_DONE="destroy").check()
    assert len(calls(vast)) == before
    resume(job, vast, "--set", 'when_done="destroy"', "--when-done", "stop", ABLITERATE_WHEN_DONE="nothing").check()
    assert calls(vast)[before:] == ["DELETE"]
    resume(job, vast, "--when-done", "burn").fails(2, "when_done", "choose from")


def test_a_full_device_for_all_that_is_said_keeps_no_rental(job: FinishedJob, vast: VastServer) -> None:
    """Regression: sent nothing."""
    command = [sys.executable, "-m", "job", "resume", "--workspace", str(job.workspace), "--set", 'when_done="destroy"']
    with open("/dev/full", "w") as full:
        env = environment(**rented(vast))
        subprocess.run(command, stdout=full, stderr=full, env={**env, "PYTHONPATH": str(Path(__file__).parents[3])})
    assert calls(vast) == ["DELETE"]


def fill(file: Path) -> None:
    with file.open("wb", buffering=0) as opened:
        while True:
            try:
                opened.write(bytes(4096))
            except OSError:
                return


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
@pytest.mark.parametrize("state", ["full", "read-only"])
def test_a_workspace_that_is_full_or_read_only_keeps_no_rental(
    vast: VastServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state: str
) -> None:
    point = tmp_path / "disk"
    point.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "none", str(point)]
    if subprocess.run(mount, capture_output=True).returncode:  # only root may mount a full or read-only disk
        pytest.skip("no mounts here")
    try:
        places = (tmp_path / "mirror").as_uri(), (tmp_path / "out").as_uri()
        job = finished_job(point / "runs", *places, allow=[VOUCHED])
        if state == "full":
            fill(point / "ballast")
            assert shutil.disk_usage(point).free == 0
        else:
            subprocess.run(["mount", "-o", "remount,ro", str(point)], check=True)
        assert end(job, vast, monkeypatch, action="stop")[0] == ["PUT"]
        # Without room for copies nothing can be proved to be elsewhere, so a destroy becomes a stop.
        vast.instances[12345].update(intended_status="running", actual_status="running")
        found, said = end(job, vast, monkeypatch)
        assert set(found) <= {"PUT"}, said
    finally:
        subprocess.run(["umount", str(point)], check=True)


def test_a_refused_start_destroys_nothing(vast: VastServer, tmp_path: Path) -> None:
    """Regression: sent DELETE."""
    gone = ["run", tmp_path / "no-model", "--workspace", tmp_path / "runs", "--when-failed", "destroy"]
    abliterate(*gone, **rented(vast)).fails(3, "there is no model folder")
    assert calls(vast) == ["PUT"]


@pytest.mark.parametrize(
    ("arguments", "env"),
    [
        (["run", "cook/soup", "--trials", "many"], {}),
        (["run", "cook/soup", "--set", "trails=3"], {}),
        (["run", "cook/soup", "--no-such-option"], {}),
        (["run", "cook/soup"], {"ABLITERATE_TRAILS": "3"}),
        (["run", "cook/soup", "--config", "/no/such/file.toml"], {}),
        (["resume", "--checkpoint", "EMPTY"], {}),
    ],
)
def test_settings_errors_end_the_meter(
    vast: VastServer, tmp_path: Path, arguments: list[str], env: dict[str, str]
) -> None:
    """Regression: sent nothing."""
    (tmp_path / "empty").mkdir()
    words = [(tmp_path / "empty").as_uri() if word == "EMPTY" else word for word in arguments]
    asked = ("--workspace", tmp_path / "runs", "--set", "when_failed=destroy")
    done = abliterate(*words, *asked, **rented(vast, **env))
    assert done.code == 2, done.err
    assert calls(vast) == ["PUT"], done.err
    assert "Traceback" not in done.err


@pytest.mark.parametrize("asked", ["stop", "destroy"])
def test_a_restart_that_cannot_begin_stops_the_machine_of_the_job_that_is_there(
    tmp_path: Path, vast: VastServer, asked: str
) -> None:
    """Regression: the machine's own job counted as another one, and the machine went on billing."""
    job = finished_job(tmp_path / "runs", (tmp_path / "mirror").as_uri(), None, state="running")
    wrong = ("--set", "s3.no_such_setting=1", "--workspace", job.workspace, "--when-failed", asked)
    done = abliterate("resume", *wrong, **rented(vast))
    assert done.code == 2, done.err
    assert calls(vast) == ["PUT"], done.err
    # Beside another job it is unknown which one the machine belongs to.
    shutil.copytree(job.folder.path, job.workspace / ("0" * 12))
    abliterate("resume", *wrong, **rented(vast))
    assert calls(vast) == ["PUT"]


class Waiting:
    """An unfinished job whose start blocks half-way, with nothing computed."""

    def __init__(self, tmp_path: Path, server: VastServer, *arguments: str) -> None:
        mirror = (tmp_path / "mirror").as_uri()
        self.job = finished_job(tmp_path / "runs", mirror, None, state="running", allow=[VOUCHED])
        (self.job.export / ".done").unlink()
        state = self.job.folder.state_file
        kept = state.with_name("kept")
        state.rename(kept)
        os.mkfifo(state)
        options = ["--workspace", str(self.job.workspace), *arguments]
        self.process = start("resume", *options, **rented(server))
        self.pipe = -1
        wait_until(self._reads, self.process)
        kept.replace(state)

    def _reads(self) -> bool:
        """Return whether the start is reading its state, from a pipe that never answers."""
        try:
            self.pipe = os.open(self.job.folder.state_file, os.O_WRONLY | os.O_NONBLOCK)
        except OSError:
            return False
        return True

    @property
    def child(self) -> psutil.Process:
        (found,) = psutil.Process(self.process.pid).children()
        return found

    def ended(self) -> tuple[int, str]:
        said = self.process.communicate(timeout=120)[1]
        os.close(self.pipe)
        return self.process.returncode, said


@pytest.mark.parametrize(
    ("number", "asked", "expected"),
    [
        (signal.SIGKILL, "destroy", ["DELETE"]),
        (signal.SIGKILL, "stop", ["PUT"]),
        (signal.SIGSEGV, "stop", ["PUT"]),
        (signal.SIGABRT, "destroy", ["DELETE"]),
    ],
)
def test_a_killed_process_ends_the_meter(
    tmp_path: Path, vast: VastServer, number: signal.Signals, asked: str, expected: list[str]
) -> None:
    """Regression: sent nothing."""
    waiting = Waiting(tmp_path, vast, "--set", f"when_failed={asked}")
    waiting.child.send_signal(number)
    code, said = waiting.ended()
    assert code == -number
    assert calls(vast) == expected, said


def test_a_killed_process_beside_another_job_ends_nothing(tmp_path: Path, vast: VastServer) -> None:
    waiting = Waiting(tmp_path, vast, "--set", "when_failed=destroy")
    finished_job(waiting.job.workspace, None, None, seed=8, state="running")
    waiting.child.kill()
    code, said = waiting.ended()
    assert (code, calls(vast)) == (-signal.SIGKILL, []), said
    assert "BILLS ON" in said


@pytest.mark.parametrize("whom", ["supervisor", "group"])
def test_a_stop_signal_is_passed_on_once_and_ends_no_machine(tmp_path: Path, vast: VastServer, whom: str) -> None:
    waiting = Waiting(tmp_path, vast, "--set", "when_failed=destroy")
    child = waiting.child
    if whom == "group":
        child.send_signal(signal.SIGTERM)
    waiting.process.send_signal(signal.SIGTERM)
    code, said = waiting.ended()
    assert code == 75, said
    assert "run the same command again" in said
    assert calls(vast) == []
    assert not child.is_running()


def test_a_killed_supervisor_takes_its_child_along(tmp_path: Path, vast: VastServer) -> None:
    waiting = Waiting(tmp_path, vast, "--set", "when_failed=destroy")
    child = waiting.child
    psutil.Process(waiting.process.pid).kill()
    wait_until(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE)
    waiting.process.communicate(timeout=60)
    os.close(waiting.pipe)
    assert calls(vast) == []


# --- the supervisor ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "env", "expected"),
    [
        (["run", "m", "--when-failed", "stop"], {}, "stop"),
        (["run", "m", "--when-failed=destroy"], {}, "destroy"),
        (["abliterate", "run", "m", "--when-failed", "stop"], {}, "stop"),
        (["resume", "--when-failed", "stop"], {}, "stop"),
        (["run", "m", "--when-failed", "stop", "--when-failed", "destroy"], {}, "destroy"),
        (["run", "m", "--set", 'when_failed = "destroy"'], {}, "destroy"),
        (["run", "m", "--set", "when_failed=destroy", "--when-failed", "stop"], {}, "destroy"),
        (["run", "m"], {"ABLITERATE_WHEN_FAILED": "stop"}, "stop"),
        (["run", "m"], {"abliterate_when_failed": '"stop"'}, "stop"),
        (["run", "m", "--when-failed", "nothing"], {"ABLITERATE_WHEN_FAILED": "stop"}, "nothing"),
        (["run", "m", "--config", "FILE"], {}, "destroy"),
        (["run", "m", "--config=FILE"], {"ABLITERATE_WHEN_FAILED": "stop"}, "stop"),
        (["run", "m", "--config", "/no/such/file"], {}, "nothing"),
        (["run", "m", "--when-failed", "destory"], {}, "stop"),
        (["run", "m", "--when-failed"], {}, "nothing"),
        (["run", "m", "--when-done", "destroy"], {}, "nothing"),
        (["run", "m"], {"ABLITERATE_WHEN_FAILED": ""}, "nothing"),
        (["status"], {"ABLITERATE_WHEN_FAILED": "stop"}, "nothing"),
        (["--help"], {"ABLITERATE_WHEN_FAILED": "stop"}, "nothing"),
        ([], {"ABLITERATE_WHEN_FAILED": "stop"}, "nothing"),
    ],
)
def test_what_is_asked_for_is_known_before_settings_are_read(
    tmp_path: Path, arguments: list[str], env: dict[str, str], expected: str
) -> None:
    file = tmp_path / "job.toml"
    file.write_text(
        'trials = \nwhen_done = "stop"\n  when_failed = "destroy"  # or not\n'
    )  # invalid TOML, but read anyway
    assert asked_when_failed([word.replace("FILE", str(file)) for word in arguments], env) == expected


def test_the_supervisor_is_small_and_quick() -> None:
    code = "import sys; before = set(sys.modules); import job.lifecycle.supervisor\n" + (
        "print(*sorted(set(sys.modules) - before))"
    )
    env = {**environment(**UNMEASURED), "PYTHONPATH": str(Path(__file__).parents[3])}
    loaded = subprocess.run([sys.executable, "-S", "-c", code], check=True, capture_output=True, text=True, env=env)
    assert not {"torch", "typer", "pydantic", "asyncio", "subprocess", "json"} & set(loaded.stdout.split())
    times = []
    for _ in range(5):
        before = os.times()
        subprocess.run([sys.executable, "-S", "-c", "import job.lifecycle.supervisor"], check=True, env=env)
        after = os.times()
        times.append(after.children_user + after.children_system - before.children_user - before.children_system)
    assert min(times) < 0.1  # CPU time, so that other processes do not count


@pytest.mark.parametrize("code", [0, 1, 3, 6, 75, 76, 120])
def test_exit_codes_pass_through_and_strangers_are_reaped(tmp_path: Path, code: int) -> None:
    """A supervisor that adopts orphans, like a container's first process, reaps them."""
    script = f"""
import os, sys, time
sys.path.insert(0, {str(Path(__file__).parents[3])!r})
from job.lifecycle import supervisor
from job.system import lifeline
if not lifeline.adopt():
    import ctypes
    ctypes.CDLL(None).prctl(36, 1)  # PR_SET_CHILD_SUBREAPER
    sys.argv = ["abliterate", "run", "--when-failed", "stop"]
    supervisor.supervised()
reading, writing = os.pipe()
if os.fork() == 0:
    if orphan := os.fork():
        os.write(writing, str(orphan).encode())
        os._exit(0)
    time.sleep(0.1)
    os._exit(9)  # an orphan by now
orphan, end = int(os.read(reading, 20)), time.monotonic() + 10
while os.path.exists(f"/proc/{{orphan}}") and time.monotonic() < end:  # until it is reaped
    time.sleep(0.01)
print([orphan] if os.path.exists(f"/proc/{{orphan}}") else [], flush=True)
os._exit({code})
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment(**UNMEASURED), cwd=tmp_path
    )
    assert done.returncode == code, done.stderr
    assert done.stdout == "[]\n"


BEGIN = f"""
import os, sys
sys.path.insert(0, {str(Path(__file__).parents[3])!r})
from job.lifecycle import supervisor
from job.system import lifeline
again = os.environ.get("AGAIN")
sys.argv = ["abliterate", "run", "--when-failed", "stop", "--workspace", os.environ["RUNS"]]
supervisor.supervised()
"""
RESTART = "os.environ['AGAIN'] = '1'; again or lifeline.restart();"


@pytest.mark.parametrize(
    ("does", "code", "expected"),
    [
        ("lifeline.tell(hung=True); os._exit(75)", 75, ["PUT"]),  # as the watchdog does
        ("os._exit(75)", 75, []),
        ("os._exit(1)", 1, ["PUT"]),
        ("lifeline.tell(settled=True); os._exit(1)", 1, []),
        ("lifeline.tell(when_failed='nothing'); os._exit(1)", 1, []),
        ("os._exit(4)", 4, []),
        ("os._exit(0)", 0, []),
        ("import ctypes; ctypes.string_at(0)", -signal.SIGSEGV, ["PUT"]),
        ("os.abort()", -signal.SIGABRT, ["PUT"]),
        # A new process after a device fault is supervised like the first.
        (f"{RESTART} assert lifeline.is_supervised(); os._exit(6)", 6, ["PUT"]),
        (f"{RESTART} lifeline.tell(settled=True); os._exit(6)", 6, []),
    ],
)  # fmt: skip
def test_what_the_supervisor_makes_of_an_end(
    tmp_path: Path, vast: VastServer, does: str, code: int, expected: list[str]
) -> None:
    env = environment(**rented(vast), **UNMEASURED, RUNS=str(tmp_path / "runs"))
    done = subprocess.run([sys.executable, "-c", BEGIN + does], capture_output=True, text=True, env=env, cwd=tmp_path)
    assert (done.returncode, calls(vast)) == (code, expected), done.stderr


def test_the_watchdog_tells_before_it_leaves(tmp_path: Path) -> None:
    """In its own process, with a pipe instead of a supervisor."""
    script = """
import os, sys, time, torch
from pathlib import Path
from job.system import lifeline
from job.model.device_faults import Watchdog
lifeline.adopt()
class Hung(torch.nn.Module):
    def forward(self, x):
        time.sleep(60)
model = Hung()
with Watchdog(0.2, Path(sys.argv[1])).watching(model):
    model(1)
"""
    reading, writing = os.pipe()
    env = {**environment(**UNMEASURED), "ABLITERATION_SUPERVISOR": str(writing)}
    env["PYTHONPATH"] = str(Path(__file__).parents[3])
    command = [sys.executable, "-c", script, str(tmp_path / "stacks.txt")]
    done = subprocess.run(command, env=env, pass_fds=[writing], capture_output=True, text=True)
    os.close(writing)
    told = os.read(reading, 1000)
    os.close(reading)
    assert done.returncode == 75, done.stderr
    assert json.loads(told) == {"hung": True}


def test_a_process_that_is_not_supervised_tells_nobody(tmp_path: Path) -> None:
    from job.system.lifeline import is_supervised, tell

    assert not is_supervised()
    tell(settled=True)


def test_run_folders_keep_no_ends(job: FinishedJob) -> None:
    from job.config.load import load_settings
    from job.config.schema import ENDS
    from job.storage.identity import EXTENDING, stored

    settings = load_settings({"model": "cook/soup", "when_done": "destroy", "when_failed": "stop"}).settings
    assert not stored(settings).keys() & set(ENDS)
    assert set(ENDS) <= EXTENDING
    assert RunFolder(job.folder.path).read_job().identity
