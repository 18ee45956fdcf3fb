"""Power losses: unsynced data is dropped at every step of a real run, and the rest is consistent."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

from job.mirror import MirrorOptions, open_mirror
from job.records import Manifest, ManifestEntry
from job.storage.atomic import read_record, sha256_file, write_record
from job.storage.exports import MANIFEST
from job.storage.run_folder import RunFolder
from job.storage.study_file import BACKUP, count_trials, restore_if_damaged
from job.transfer.folders import deliver
from tests.fakes.power import Names, Recorder
from tests.fakes.preloaded import preloaded
from tests.helpers import environment, job_arguments
from tests.integration.search.test_optimizer import Runs
from tests.mirror_places import file_place
from tests.mirrors import CALM, JOB, Place, add_trial, mirrored, save, write_folder

__all__ = ["file_place"]

pytestmark = pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="preloaded libraries are a matter of Linux")


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return preloaded("power", tmp_path_factory.mktemp("power"))


@pytest.fixture
def recorder(library: Path, tmp_path: Path) -> Recorder:
    return Recorder(library, tmp_path / "records")


@pytest.fixture(params=get_args(Names))
def names(request: pytest.FixtureRequest) -> Names:
    found: Names = request.param
    return found


_MIRROR = """
from job.mirror import MirrorOptions, open_mirror
from job.storage.run_folder import RunFolder
from tests.mirrors import CALM, IDENTITY
mirror = open_mirror(sys.argv[1], MirrorOptions(pace=CALM))
"""
_RESTORE = _MIRROR + "begin(); mirror.claim(RunFolder(Path(sys.argv[2])), IDENTITY, print).close(final=False)"
_SAVE = (
    _MIRROR
    + """
from tests.mirrors import add_trial
claim = mirror.claim(RunFolder(Path(sys.argv[2])), IDENTITY, print)
begin(); claim.start(); claim.request()
assert claim.close()
"""
)


@pytest.mark.parametrize("overtaken", [False, True])
def test_a_restore_is_whole_or_not_there(
    file_place: Place, recorder: Recorder, tmp_path: Path, names: Names, overtaken: bool
) -> None:
    run = write_folder(tmp_path / "a" / JOB, ballast=300_000)
    save(file_place, run.path)
    fresh = tmp_path / "b" / JOB
    fresh.parent.mkdir()
    if overtaken:
        shutil.copytree(run.path, fresh)
        fresh.joinpath("mirror.json").unlink()
        add_trial(fresh / "study.db", 77)
    former = mirrored(fresh) if overtaken else None
    recorder.run(_RESTORE, fresh.parent, file_place.uri, str(fresh))
    wanted, seen = mirrored(run.path), 0
    for left in recorder.losses(tmp_path / "left", names):
        if (left / JOB / "job.json").exists():
            found = mirrored(left / JOB)
            assert found in (wanted, former), left
            seen += found == wanted
    assert seen


def test_a_mirror_is_whole_at_every_step(file_place: Place, recorder: Recorder, tmp_path: Path, names: Names) -> None:
    run = write_folder(tmp_path / "a" / JOB, ballast=300_000)
    save(file_place, run.path)
    add_trial(run.study_file, 3)
    root = tmp_path / "other disk"
    recorder.run(_SAVE, root, file_place.uri, str(run.path))
    trials = set()
    for number, left in enumerate(recorder.losses(tmp_path / "left", names)):
        fresh = RunFolder(tmp_path / "fresh" / str(number) / JOB)
        with open_mirror(left.as_uri(), MirrorOptions(pace=CALM)) as mirror:
            mirror.fetch(JOB, fresh.path.parent, whole=True)
        trials.add(count_trials(fresh.study_file))
    assert trials == {3, 4}


_MAKE_MIRROR = (
    _MIRROR
    + """
begin()
claim = mirror.claim(RunFolder(Path(sys.argv[2])), IDENTITY, print)
claim.start(); claim.request()
assert claim.close()
"""
)


def test_a_new_mirror_is_there_once_it_is_said_to_be(recorder: Recorder, tmp_path: Path, names: Names) -> None:
    run = write_folder(tmp_path / "a" / JOB)
    disk = tmp_path / "disk"
    disk.mkdir()
    uri = (disk / "some" / "where").as_uri()
    recorder.run(_MAKE_MIRROR, disk, uri, str(run.path))
    *_, last = (mirrored_from(left / "some" / "where", tmp_path) for left in recorder.losses(tmp_path / "left", names))
    assert last == 3


def mirrored_from(root: Path, tmp_path: Path) -> int | None:
    """Return the number of trials in a mirror's study, None where there is no job."""
    if not (root / JOB / "head.json").exists():
        return None
    fresh = RunFolder(tmp_path / "fresh" / JOB)
    shutil.rmtree(fresh.path, ignore_errors=True)
    with open_mirror(root.as_uri(), MirrorOptions(pace=CALM)) as mirror:
        found = mirror.fetch(JOB, fresh.path.parent, whole=True)
    return count_trials(fresh.study_file) if found.head.files else None


_REPAIR = "from job.storage.study_file import restore_if_damaged\nbegin(); assert restore_if_damaged(Path(sys.argv[1]))"


@pytest.mark.parametrize("damage", ["emptied", "torn"])
def test_a_study_is_restored_or_still_can_be(recorder: Recorder, tmp_path: Path, names: Names, damage: str) -> None:
    folder = tmp_path / "job"
    folder.mkdir()
    file = folder / "study.db"
    Runs().run(file, 8, 4)
    assert (folder / BACKUP).exists()
    file.write_bytes(b"" if damage == "emptied" else file.read_bytes()[:9000])
    recorder.run(_REPAIR, folder, str(file))
    for left in recorder.losses(tmp_path / "left", names):
        restore_if_damaged(left / "study.db")
        assert count_trials(left / "study.db") == 8


_TRIALS = "from tests.integration.search.test_optimizer import Runs\nbegin(); Runs().run(Path(sys.argv[1]), 12, 4)"


def test_a_search_loses_no_more_than_the_batch_in_flight(recorder: Recorder, tmp_path: Path, names: Names) -> None:
    folder = tmp_path / "job"
    folder.mkdir()
    Runs().run(folder / "study.db", 4, 4)
    recorder.run(_TRIALS, folder, str(folder / "study.db"))
    seen = []
    for left in recorder.losses(tmp_path / "left", names):
        restore_if_damaged(left / "study.db")
        seen.append(count_trials(left / "study.db"))
    assert None not in seen
    assert seen == sorted(seen)  # type: ignore[type-var]
    assert {*seen} == {4, 8, 12}


_DELIVER = "from job.transfer.folders import deliver\nbegin(); deliver(Path(sys.argv[1]), sys.argv[2])"


@pytest.mark.parametrize("former", [False, True])
def test_a_delivery_to_a_folder_is_whole_or_not_there(
    recorder: Recorder, tmp_path: Path, names: Names, former: bool
) -> None:
    export, disk = tmp_path / "disk" / "export", tmp_path / "disk"
    _write_export(export, b"weights")
    target = disk / "deeper" / "delivered"
    if former:
        _write_export(tmp_path / "old", b"other weights")
        deliver(tmp_path / "old", target.as_uri())
    recorder.run(_DELIVER, disk, str(export), target.as_uri())
    seen = []
    for left in recorder.losses(tmp_path / "left", names):
        delivered = left / "deeper" / "delivered"
        if (delivered / MANIFEST).exists():
            files = read_record(delivered / MANIFEST, Manifest).files
            assert {name: sha256_file(delivered / name) for name in files} == {n: e.sha256 for n, e in files.items()}
            seen.append((delivered / "model.safetensors").read_bytes())
    assert seen[-1] == b"weights"


def _write_export(folder: Path, weights: bytes) -> None:
    folder.mkdir(parents=True)
    files = {"model.safetensors": weights, "config.json": b"{}", "README.md": b"# card\n"}
    for name, data in files.items():
        (folder / name).write_bytes(data)
    entries = {name: ManifestEntry(sha256=sha256_file(folder / name), size=len(files[name])) for name in files}
    write_record(folder / MANIFEST, Manifest(files=entries))


def test_records_are_the_old_or_the_new_ones(recorder: Recorder, tmp_path: Path, names: Names) -> None:
    folder = tmp_path / "job"
    folder.mkdir()
    script = """
from job.records import Upload
from job.storage.run_folder import RunFolder
run = RunFolder(Path(sys.argv[1]))
run.record_upload(Upload(target="file:///a", export="x", state="failed"))
begin()
run.record_upload(Upload(target="file:///b", export="x", state="failed"))
run.record_upload(Upload(target="file:///a", export="x", state="done"))
"""
    recorder.run(script, folder, str(folder))
    seen = [
        {upload.target: upload.state for upload in RunFolder(left).read_uploads()}
        for left in recorder.losses(tmp_path / "left", names)
    ]
    assert seen[0] == {"file:///a": "failed"}
    assert seen[-1] == {"file:///a": "done", "file:///b": "failed"}


def test_a_job_runs_and_is_delivered_where_folders_cannot_be_synced(
    library: Path, organism: Path, tmp_path: Path
) -> None:
    words = [*job_arguments(organism), "--workspace", tmp_path / "runs", "--trials", "1", "--set", "startup_trials=1"]
    words += ["--upload", (tmp_path / "out").as_uri(), "--checkpoint", (tmp_path / "mirror").as_uri()]
    # One process for both commands: a library is preloaded only into one that loads everything itself.
    code = """
import sys
from job.cli.main import main
for command in ("preflight", "run"):
    sys.argv[1:2] = [command]
    try:
        main()
    except SystemExit as end:
        if end.code:
            raise
    print(f"{command} has ended")
"""
    env = environment(LD_PRELOAD=str(library), POWER_FOLDER_ERRNO="22")  # EINVAL
    command = [sys.executable, "-c", code, "", *map(str, words)]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(f"{command} has ended" in done.stdout for command in ("preflight", "run"))
    assert (tmp_path / "out" / "model.safetensors").is_file()


@pytest.mark.parametrize("number", [22, 95])  # EINVAL, ENOTSUP
def test_a_folder_that_cannot_be_synced_is_let_be_and_a_file_is_not(library: Path, tmp_path: Path, number: int) -> None:
    def write(**env: str) -> subprocess.CompletedProcess[str]:
        code = "import sys, pathlib, job.storage.run_folder as w; w.write_atomically(pathlib.Path(sys.argv[1]), b'x')"
        command = [sys.executable, "-c", code, str(tmp_path / "file")]
        return subprocess.run(command, env=environment(LD_PRELOAD=str(library), **env), capture_output=True, text=True)

    assert write(POWER_FOLDER_ERRNO=str(number)).returncode == 0
    assert (tmp_path / "file").read_bytes() == b"x"
    assert "MachineError" in write(POWER_FILE_ERRNO=str(number)).stderr
    assert "MachineError" in write(POWER_FOLDER_ERRNO="5").stderr  # EIO is never ignored
