"""A run folder from a mirror: all of it is there and verified before anything is put in place, job.json last."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

from job.checkpoint.records import CACHES, MIRRORED, Entry, Head, torn
from job.checkpoint.snapshot import check_study
from job.checkpoint.store import Store
from job.errors import JobError, MachineError
from job.failpoints import reached
from job.records import JobRecord
from job.workspace import RunFolder, cannot_write, read_record, sha256_file, sync_folder

INCOMING, SUPERSEDED = ".restoring", "superseded"


def restore(store: Store, head: Head, folder: RunFolder, say: Callable[[str], None]) -> None:
    """Make a run folder what the latest snapshot says; what stands there is moved aside, exports are left alone.

    Raises:
        MirrorError: An object is missing or not what it should be; the folder is as it was.
        DeliveryError: The mirror cannot be reached; the folder is as it was.
        MachineError: The folder cannot be written.
    """
    incoming = folder.path / INCOMING
    say(f"restoring job {head.job_id} from {store.uri}: {head.size / 1e6:.1f} MB, generation {head.generation}")
    try:
        shutil.rmtree(incoming, ignore_errors=True)
        incoming.mkdir(parents=True)
        missing = {path: entry for path, entry in head.files.items() if not _is_there(folder.path, path, entry)}
        download(store, head, missing, incoming)
        _verify(store, head, RunFolder(incoming))
        aside = _move_aside(folder)
        if aside is not None:
            say(f"warning: another machine went on with this job: what stood here is now in {aside}")
        _move_in(folder.path, incoming, missing)
        shutil.rmtree(incoming, ignore_errors=True)
    except OSError as error:
        raise cannot_write(folder.path, error) from error


def download(store: Store, head: Head, paths: Iterable[str], target: Path) -> None:
    """Write files of the latest snapshot under a folder, each verified.

    Raises:
        MirrorError: An object is missing or not what it should be.
        DeliveryError: The mirror cannot be reached.
        OSError: The folder cannot be written.
    """
    for path in paths:
        entry, file = head.files[path], target / path
        file.parent.mkdir(parents=True, exist_ok=True)
        for attempt in range(2):  # the second time tells a bad line from a bad object
            try:
                store.fetch(head.job_id, entry, file)
            except FileNotFoundError as error:
                raise torn(store.uri, head.job_id, f"the contents of {path} are missing") from error
            reached("restore:fetched")
            if sha256_file(file) == entry.sha256:
                break
            if attempt:
                raise torn(store.uri, head.job_id, f"the contents of {path} are not what they were")


def _is_there(folder: Path, path: str, entry: Entry) -> bool:
    """Return whether a large file need not be downloaded: it never changes in place."""
    file = folder / path
    if Path(path).parts[0] not in CACHES or not file.is_file() or file.stat().st_size != entry.size:
        return False
    return sha256_file(file) == entry.sha256


def _verify(store: Store, head: Head, incoming: RunFolder) -> None:
    try:
        if "study.db" in head.files:
            check_study(incoming.study_file)
        record = read_record(incoming.job_file, JobRecord)
    except MachineError:
        raise
    except JobError as error:
        raise torn(store.uri, head.job_id, str(error).replace(str(incoming.path), "restored")) from error
    if record.job_id != head.job_id:
        raise torn(store.uri, head.job_id, f"job.json is of job {record.job_id}")


def _move_aside(folder: RunFolder) -> Path | None:
    """Move away what is to be replaced, job.json first: without it nothing takes the rest for a job."""
    names = [name for name in reversed(MIRRORED) if name not in CACHES and (folder.path / name).exists()]
    if not names:
        return None
    number = 1
    while (aside := folder.path / f"{SUPERSEDED}-{number}").exists():
        number += 1
    aside.mkdir()
    for name in names:
        (folder.path / name).replace(aside / name)
        reached("restore:aside")
        if name == "job.json":
            sync_folder(folder.path)
    # A study's journal belongs to that study: beside another one it would spoil it.
    for journal in folder.path.glob("study.db-*"):
        journal.replace(aside / journal.name)
        reached("restore:journal")
    return aside


def _move_in(folder: Path, incoming: Path, paths: Iterable[str]) -> None:
    for path in sorted(paths, key=lambda path: (path == "job.json", path)):
        if path == "job.json":
            sync_folder(folder)
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        (incoming / path).replace(target)
        reached("restore:in")
    sync_folder(folder)
