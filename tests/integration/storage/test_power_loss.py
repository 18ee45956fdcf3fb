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
from tests.cases import BRIEF, write_brief
from tests.fakes.power import Names, Recorder
from tests.fakes.preloaded import preloaded
from tests.helpers import environment, job_arguments, run_script
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


NAMES: tuple[Names, ...] = get_args(Names)


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
    file_place: Place, recorder: Recorder, tmp_path: Path, overtaken: bool
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
    wanted = mirrored(run.path)
    for names in NAMES:
        seen = 0
        for left in recorder.losses(tmp_path / "left", names):
            if (left / JOB / "job.json").exists():
                found = mirrored(left / JOB)
                assert found in (wanted, former), left
                seen += found == wanted
        assert seen, names


def test_a_mirror_is_whole_at_every_step(file_place: Place, recorder: Recorder, tmp_path: Path) -> None:
    run = write_folder(tmp_path / "a" / JOB, ballast=300_000)
    save(file_place, run.path)
    add_trial(run.study_file, 3)
    root = tmp_path / "other disk"
    recorder.run(_SAVE, root, file_place.uri, str(run.path))
    for names in NAMES:
        trials = set()
        for number, left in enumerate(recorder.losses(tmp_path / "left", names)):
            fresh = RunFolder(tmp_path / f"fresh-{names}" / str(number) / JOB)
            with open_mirror(left.as_uri(), MirrorOptions(pace=CALM)) as mirror:
                mirror.fetch(JOB, fresh.path.parent, whole=True)
            trials.add(count_trials(fresh.study_file))
        assert trials == {3, 4}, names


_MAKE_MIRROR = (
    _MIRROR
    + """
begin()
claim = mirror.claim(RunFolder(Path(sys.argv[2])), IDENTITY, print)
claim.start(); claim.request()
assert claim.close()
"""
)


def test_a_new_mirror_is_there_once_it_is_said_to_be(recorder: Recorder, tmp_path: Path) -> None:
    run = write_folder(tmp_path / "a" / JOB)
    disk = tmp_path / "disk"
    disk.mkdir()
    uri = (disk / "some" / "where").as_uri()
    recorder.run(_MAKE_MIRROR, disk, uri, str(run.path))
    for names in NAMES:
        losses = recorder.losses(tmp_path / "left", names)
        *_, last = (mirrored_from(left / "some" / "where", tmp_path) for left in losses)
        assert last == 3, names


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
def test_a_study_is_restored_or_still_can_be(recorder: Recorder, tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "job"
    folder.mkdir()
    file = folder / "study.db"
    Runs().run(file, 8, 4)
    assert (folder / BACKUP).exists()
    file.write_bytes(b"" if damage == "emptied" else file.read_bytes()[:9000])
    recorder.run(_REPAIR, folder, str(file))
    for names in NAMES:
        for left in recorder.losses(tmp_path / "left", names):
            restore_if_damaged(left / "study.db")
            assert count_trials(left / "study.db") == 8, names


_TRIALS = "from tests.integration.search.test_optimizer import Runs\nbegin(); Runs().run(Path(sys.argv[1]), 12, 4)"


def test_a_search_loses_no_more_than_the_batch_in_flight(recorder: Recorder, tmp_path: Path) -> None:
    folder = tmp_path / "job"
    folder.mkdir()
    Runs().run(folder / "study.db", 4, 4)
    recorder.run(_TRIALS, folder, str(folder / "study.db"))
    for names in NAMES:
        seen = []
        for left in recorder.losses(tmp_path / "left", names):
            restore_if_damaged(left / "study.db")
            seen.append(count_trials(left / "study.db"))
        assert None not in seen
        assert seen == sorted(seen)  # type: ignore[type-var]
        assert {*seen} == {4, 8, 12}, names


_DELIVER = "from job.transfer.folders import deliver\nbegin(); deliver(Path(sys.argv[1]), sys.argv[2])"


@pytest.mark.parametrize("former", [False, True])
def test_a_delivery_to_a_folder_is_whole_or_not_there(recorder: Recorder, tmp_path: Path, former: bool) -> None:
    export, disk = tmp_path / "disk" / "export", tmp_path / "disk"
    _write_export(export, b"weights")
    target = disk / "deeper" / "delivered"
    if former:
        _write_export(tmp_path / "old", b"other weights")
        deliver(tmp_path / "old", target.as_uri())
    recorder.run(_DELIVER, disk, str(export), target.as_uri())
    for names in NAMES:
        seen = []
        for left in recorder.losses(tmp_path / "left", names):
            delivered = left / "deeper" / "delivered"
            if (delivered / MANIFEST).exists():
                files = read_record(delivered / MANIFEST, Manifest).files
                found = {name: sha256_file(delivered / name) for name in files}
                assert found == {name: entry.sha256 for name, entry in files.items()}, names
                seen.append((delivered / "model.safetensors").read_bytes())
        assert seen[-1] == b"weights", names


def _write_export(folder: Path, weights: bytes) -> None:
    folder.mkdir(parents=True)
    files = {"model.safetensors": weights, "config.json": b"{}", "README.md": b"# card\n"}
    for name, data in files.items():
        (folder / name).write_bytes(data)
    entries = {name: ManifestEntry(sha256=sha256_file(folder / name), size=len(files[name])) for name in files}
    write_record(folder / MANIFEST, Manifest(files=entries))


def test_records_are_the_old_or_the_new_ones(recorder: Recorder, tmp_path: Path) -> None:
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
    for names in NAMES:
        seen = [
            {upload.target: upload.state for upload in RunFolder(left).read_uploads()}
            for left in recorder.losses(tmp_path / "left", names)
        ]
        assert seen[0] == {"file:///a": "failed"}, names
        assert seen[-1] == {"file:///a": "done", "file:///b": "failed"}, names


# In one process, which loads its libraries once.
_PREFLIGHT_AND_RUN = """
import sys
from job.cli.main import main
words = sys.argv[1:]
for command in ("preflight", "run"):
    sys.argv[1:] = [command, *words]
    main()
"""


@pytest.mark.full("kills")
def test_a_job_runs_and_is_delivered_where_folders_cannot_be_synced(
    library: Path, organism: Path, tmp_path: Path
) -> None:
    write_brief(organism, tmp_path / "brief")
    words = [*job_arguments(tmp_path / "brief"), "--workspace", tmp_path / "runs", "--trials", 1, *BRIEF]
    words += ["--upload", (tmp_path / "out").as_uri(), "--checkpoint", (tmp_path / "mirror").as_uri()]
    env = environment(LD_PRELOAD=str(library), POWER_FOLDER_ERRNO="22")  # EINVAL
    run_script(_PREFLIGHT_AND_RUN, *words, env=env).check()
    assert (tmp_path / "out" / "model.safetensors").is_file()


@pytest.mark.parametrize("number", [22, 95])  # EINVAL, ENOTSUP
def test_a_folder_that_cannot_be_synced_is_let_be_and_a_file_is_not(library: Path, tmp_path: Path, number: int) -> None:
    def write(**env: str) -> subprocess.CompletedProcess[str]:
        code = "import sys, pathlib, job.storage.atomic as w; w.write_atomically(pathlib.Path(sys.argv[1]), b'x')"
        command = [sys.executable, "-c", code, str(tmp_path / "file")]
        return subprocess.run(command, env=environment(LD_PRELOAD=str(library), **env), capture_output=True, text=True)

    assert write(POWER_FOLDER_ERRNO=str(number)).returncode == 0
    assert (tmp_path / "file").read_bytes() == b"x"
    assert "MachineError" in write(POWER_FILE_ERRNO=str(number)).stderr
    assert "MachineError" in write(POWER_FOLDER_ERRNO="5").stderr  # EIO is never ignored
