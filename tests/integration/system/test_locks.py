"""Folder locks: the kernel's, and a lock file where the file system has none. Other processes are real."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from job.config.load import load_settings
from job.errors import HeldError
from job.mirror import MirrorOptions, Proof, open_mirror
from job.preflight import fencing
from job.preflight.mounts import Mount
from job.storage.atomic import write_record
from job.storage.jobs import open_job
from job.storage.run_folder import RunFolder
from job.system.locks import Lock, LockedError, Owner, is_locked, locked, this_owner
from job.system.processes import HolderRecord, ProcessRecord
from tests.fakes.preloaded import preloaded
from tests.helpers import abliterate, environment
from tests.mirror_places import file_place
from tests.mirrors import JOB, Place, write_folder

__all__ = ["file_place"]

HOLD = """
import sys, time
from pathlib import Path
from job.errors import HeldError
from job.storage.run_folder import RunFolder
try:
    with RunFolder(Path(sys.argv[1])).held():
        print("held", flush=True)
        sys.stdin.read()
except HeldError as error:
    print(error.line, flush=True)
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(preloaded("no_flock", tmp_path_factory.mktemp("flock")))


@pytest.fixture(params=["ENOSYS", "EOPNOTSUPP"])
def without(request: pytest.FixtureRequest, library: str) -> dict[str, str]:
    """Return the environment of a process on a file system without flock."""
    return {"LD_PRELOAD": library, "NO_FLOCK": str(getattr(errno, request.param))}


def start(script: str, *arguments: object, **env: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", script, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(COVERAGE_PROCESS_START="", **env),
    )


def line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    said = process.stdout.readline().strip()
    assert said, process.communicate()[1]
    return said


def test_a_lock_by_file_goes_with_its_process(tmp_path: Path, without: dict[str, str]) -> None:
    first = start(HOLD, tmp_path, **without)
    assert line(first) == "held"
    second = start(HOLD, tmp_path, **without)
    said = line(second)
    assert f"is held by process {first.pid} on {socket.gethostname()}" in said
    assert ".lock.owner-1" in said
    assert "Traceback" not in second.communicate()[1]
    # A process with kernel locks on the same folder respects it, too.
    assert RunFolder(tmp_path).is_held()
    with pytest.raises(HeldError, match=f"process {first.pid}"), RunFolder(tmp_path).held():
        pass
    first.send_signal(signal.SIGKILL)
    first.communicate()
    assert not RunFolder(tmp_path).is_held()
    third = start(HOLD, tmp_path, **without)
    assert line(third) == "held"
    third.communicate()  # its input ends, and it releases the lock
    assert json.loads((tmp_path / ".lock.owner-2").read_text())["released"]
    assert not (tmp_path / ".lock.owner-1").exists()
    with RunFolder(tmp_path).held():
        pass


def other(**changes: object) -> Owner:
    """Return the owner of a lock that cannot be this process."""
    here = this_owner()
    process = {"pid": here.process.pid, "start_time": 1.0, "boot_id": here.process.boot_id}
    process |= {key: value for key, value in changes.items() if key in process}  # type: ignore[dict-item]
    rest = {key: value for key, value in changes.items() if key not in process}
    return here.model_copy(update={"process": ProcessRecord.model_validate(process), **rest})


@pytest.mark.parametrize(
    ("owner", "gone"),
    [
        (other(), True),
        (other(boot_id="before"), True),
        (other(released=True, host="elsewhere", boot_id="another"), True),
        (other(boot_id="another", host="elsewhere"), False),
        (other(boot_id="another", machine="a machine of the same name"), False),
        (other(boot_id="another", host="localhost"), False),
        (other(namespace="another container"), False),
        (this_owner(), False),
    ],
)
def test_only_an_owner_that_is_certainly_gone_is_followed(tmp_path: Path, owner: Owner, gone: bool) -> None:
    file = tmp_path / ".lock"
    file.touch()
    left = tmp_path / ".lock.owner-7"
    left.write_text(owner.model_dump_json())
    assert is_locked(file) != gone
    lock = Lock(file)
    if gone:
        lock.acquire()
        lock.release()
        return
    with pytest.raises(LockedError) as caught:
        lock.acquire()
    assert caught.value.owner == owner
    assert str(left) in caught.value.remedy
    # The remedy of the message works.
    left.unlink()
    lock.acquire()
    lock.release()


def test_a_torn_lock_file_is_somebody(tmp_path: Path) -> None:
    (tmp_path / ".lock").touch()
    (tmp_path / ".lock.owner-3").write_text("")
    with pytest.raises(HeldError) as caught, RunFolder(tmp_path).held():
        pass
    assert ".lock.owner-3" in caught.value.remedy


COUNT = """
import sys, time
from pathlib import Path
from job.system.locks import locked
folder = Path(sys.argv[1])
while not (folder / "go").exists():
    time.sleep(0.001)
for _ in range(int(sys.argv[2])):
    with locked(folder / ".lock", 60) as lock:
        assert lock.by_file
        number = int((folder / "count").read_text())
        time.sleep(0.001)
        (folder / "count").write_text(str(number + 1))
"""


def test_one_at_a_time_holds_a_lock_by_file(tmp_path: Path, library: str) -> None:
    (tmp_path / "count").write_text("0")
    # A dead owner found by all of them at once.
    (tmp_path / ".lock.owner-5").write_text(other().model_dump_json())
    counting = [start(COUNT, tmp_path, 15, LD_PRELOAD=library) for _ in range(4)]
    (tmp_path / "go").touch()
    for process in counting:
        err = process.communicate(timeout=120)[1]
        assert process.returncode == 0, err
    assert (tmp_path / "count").read_text() == "60"
    assert [path.name for path in tmp_path.glob(".lock.owner-*")] == [".lock.owner-65"]


CHECK = """
import sys
from pathlib import Path
from job.preflight.disk import locking
from job.preflight.mounts import mount_of, read_mounts
print(locking(Path(sys.argv[1]), mount_of(Path(sys.argv[1]), read_mounts())).model_dump_json())
"""


def test_preflight_says_that_a_file_stands_in_for_locks(tmp_path: Path, without: dict[str, str]) -> None:
    checked = start(CHECK, tmp_path, **without)
    check = json.loads(line(checked))
    checked.communicate()
    assert (check["name"], check["status"]) == ("disk.locks", "warn")
    assert "has no flock" in check["measured"]
    assert "locks" in check["needed"]
    assert "one run of this job at a time" in check["remedy"]
    assert list(tmp_path.iterdir()) == []


PROBE = """
import sys
from job.mirror import MirrorOptions, open_mirror
with open_mirror(sys.argv[1], MirrorOptions()) as mirror:
    proof = mirror.probe()
print(proof.fenced, proof.quirks, flush=True)
"""


def test_a_mirror_without_locks_does_not_claim_to_be_fenced(
    file_place: Place, tmp_path: Path, without: dict[str, str]
) -> None:
    probing = start(PROBE, file_place.uri, **without)
    said = line(probing)
    probing.communicate()
    assert said.startswith("False")
    assert "lock files are used instead" in said
    # Still, they write one at a time.
    file_place.env = without
    run = write_folder(tmp_path / "a" / JOB)
    process = file_place.start("claim", run.path)
    assert line(process) == "claimed"
    late = file_place.start("claim", tmp_path / "b" / JOB)
    assert "HeldError" in line(late)
    late.communicate()
    process.communicate()


@pytest.fixture
def mounts(tmp_path: Path) -> Iterator[list[Path]]:
    points: list[Path] = []
    yield points
    for point in reversed(points):
        subprocess.run(["umount", "-l", str(point)], check=True)


def mount(points: list[Path], point: Path, *arguments: str) -> Path:
    point.mkdir()
    done = subprocess.run(["mount", *arguments, str(point)], capture_output=True, text=True)
    if done.returncode:  # only root may, with that capability
        pytest.skip(f"cannot mount here: {done.stderr.strip()}")
    points.append(point)
    return point


FENCED = Proof("files can be written, locked and deleted", fenced=True)


def test_two_mounts_of_one_place_share_its_locks(tmp_path: Path, mounts: list[Path]) -> None:
    first = mount(mounts, tmp_path / "first", "-t", "tmpfs", "none")
    second = mount(mounts, tmp_path / "second", "--bind", str(first))
    for place in (first, second):
        assert fencing.proven(FENCED, place / "mirror").fenced
        assert list(place.iterdir()) == []


def test_two_mounts_that_do_not_share_locks_are_no_fence(tmp_path: Path, mounts: list[Path]) -> None:
    """Two overlays of the same folders: each has separate locks, though both show the same files."""
    disk = mount(mounts, tmp_path / "disk", "-t", "tmpfs", "none")
    for name in ("lower", "upper", "work1", "work2"):
        (disk / name).mkdir()
    views = []
    for number in (1, 2):
        folders = f"lowerdir={disk}/lower,upperdir={disk}/upper,workdir={disk}/work{number},index=off"
        views.append(mount(mounts, tmp_path / f"view{number}", "-t", "overlay", "same", "-o", folders))
    (views[0] / "seen").touch()
    assert (views[1] / "seen").exists()
    with open_mirror((views[0] / "mirror").as_uri(), MirrorOptions()) as mirror:
        alone = mirror.probe()
    assert alone.fenced  # through one mount nothing is wrong
    proof = fencing.proven(alone, views[0] / "mirror")
    assert not proof.fenced
    assert str(views[1]) in proof.quirks[0]


@pytest.mark.parametrize("kind", ["nfs4", "cifs", "9p", "virtiofs", "fuse.sshfs", "fuse.s3fs"])
def test_a_place_that_other_machines_see_is_not_proven_from_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Only the file system's type is faked, as no such server is here; the locks are real."""
    number = os.stat(tmp_path).st_dev
    device = f"{os.major(number)}:{os.minor(number)}"
    table = [Mount(point="/", kind=kind, source="server:/export", device=device)]
    monkeypatch.setattr(fencing, "read_mounts", lambda: table)
    proof = fencing.proven(FENCED, tmp_path / "mirror")
    assert not proof.fenced
    assert "work between machines" in proof.quirks[0]


def test_a_lock_is_waited_for_and_no_longer_than_asked(tmp_path: Path) -> None:
    process = start(HOLD, tmp_path)
    assert line(process) == "held"
    begun = time.monotonic()
    with pytest.raises(LockedError), locked(tmp_path / ".lock", 0.3):
        pass
    assert time.monotonic() - begun > 0.3
    process.communicate()
    with locked(tmp_path / ".lock", 5) as lock:
        assert lock.by_file is False


def test_preflight_names_the_lock_that_another_machine_has_left(random_model_folder: Path, tmp_path: Path) -> None:
    options: dict[str, object] = {"model": str(random_model_folder), "workspace": str(tmp_path / "runs")}
    for name in ("good_prompts", "bad_prompts", "good_eval_prompts", "bad_eval_prompts"):
        file = tmp_path / f"{name}.txt"
        file.write_text("".join(f"Where is the {name} kettle number {number}?\n" for number in range(30)))
        options[name] = str(file)
    folder, record = open_job(load_settings(options).settings, new=False)
    write_record(folder.job_file, record)
    elsewhere = other(boot_id="another", host="elsewhere")
    write_record(folder.holder_file, HolderRecord(process=elsewhere.process, host=elsewhere.host))
    folder.lock_file.touch()
    left = folder.path / ".lock.owner-4"
    left.write_text(elsewhere.model_dump_json())
    arguments = [part for name in options if name != "model" for part in (f"--{name.replace('_', '-')}", options[name])]
    result = abliterate("preflight", random_model_folder, *arguments, "--json")
    (check,) = [one for one in json.loads(result.out)["checks"] if one["name"] == "job.lock"]
    assert (check["status"], check["measured"]) == ("fail", f"held by process {elsewhere.process.pid} on elsewhere")
    assert str(left) in check["remedy"]
    started = abliterate("run", random_model_folder, *arguments)
    assert started.code == 4
    assert str(left) in started.err
    assert "Traceback" not in started.err
