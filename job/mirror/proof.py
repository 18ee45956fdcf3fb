"""Proof that a mirror holds a run folder now: every object is read back, and the folder is not newer."""

from __future__ import annotations

from pathlib import Path

from job.mirror.lease import is_running
from job.mirror.records import Head, MirrorError, decode_head
from job.mirror.restore import download
from job.mirror.snapshot import Snapshots
from job.mirror.store import MirrorStore
from job.storage.run_folder import RunFolder
from job.storage.study_file import count_trials
from job.system.processes import this_process
from job.system.tempdirs import scratch


def shortfall(store: MirrorStore, folder: RunFolder) -> str:
    """Return what of a run folder, which must not change, the mirror lacks, or "". Raises JobError or OSError."""
    head = _head(store, folder.path.name)
    if isinstance(head, str):
        return head
    snapshots = Snapshots(folder)
    try:
        taken = snapshots.take(())
    finally:
        snapshots.clear()
    behind = [path for path, file in taken.items() if path not in head.files or head.files[path].sha256 != file.sha256]
    if behind:
        return f"{store.uri} lacks the latest {', '.join(sorted(behind)[:3])}"
    return _damage(store, head)


def overtaken(store: MirrorStore, folder: RunFolder) -> str:
    """Return why a mirror continued elsewhere may lack this folder's work, or "". Raises JobError or OSError."""
    here = _trials(folder.study_file)
    head = _head(store, folder.path.name, empty=here == 0)
    if isinstance(head, str):
        return head
    with scratch("proof") as place:
        study = [path for path in head.files if path == folder.study_file.name]
        download(store, head, study, place)
        there = _trials(place / folder.study_file.name)
    if here is None or there is None or here > there:
        return f"{store.uri} has {there or 0} trials, this machine has {'a damaged study' if here is None else here}"
    return _damage(store, head)


def holder(store: MirrorStore, job: str) -> tuple[str, bool] | None:
    """Describe another runner of a job, and whether it is on another machine, or None. Raises JobError."""
    stored = store.read(job)
    if stored is None:
        return None
    head = decode_head(stored.data, job, store.uri)
    if head.lease.process == this_process() or not is_running(head, stored):
        return None
    return head.lease.describe(), not head.lease.is_near


def _head(store: MirrorStore, job: str, *, empty: bool = False) -> Head | str:
    """Return a job's head, or why it holds nothing."""
    stored = store.read(job)
    if stored is None:
        return f"{store.uri} does not hold job {job}"
    head = decode_head(stored.data, job, store.uri)
    return head if head.files or empty else f"{store.uri} holds no snapshot of job {job}"


def _damage(store: MirrorStore, head: Head) -> str:
    with scratch("proof") as place:
        for path in head.files:
            try:
                download(store, head, [path], place)
            except MirrorError as error:
                return str(error)
            (place / path).unlink()  # together they may not fit the disk
    return ""


def _trials(study: Path) -> int | None:
    return count_trials(study) if study.exists() else 0
