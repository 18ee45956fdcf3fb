"""Restore a run folder from a mirror: download and verify everything first, install job.json last."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from job.errors import JobError, MachineError
from job.mirror.layers import assemble
from job.mirror.records import CACHES, HEAD, MIRRORED, STUDY, Head, Layered, MirroredFile, MirrorError, torn
from job.mirror.snapshot import check_study
from job.mirror.store import MirrorStore, OversizedError
from job.mirror.superseded import unique_records
from job.mirror.vetting import proven
from job.records import JobRecord
from job.storage.atomic import cannot_write, make_folder, read_record, sha256_file, sync_folder, sync_tree, write_record
from job.storage.run_folder import RunFolder
from job.storage.study_file import BACKUP, count_trials
from job.system.failpoints import reached
from job.system.tempdirs import scratch

INCOMING, SUPERSEDED = ".restoring", "superseded"
# Where records lie while newer ones that continue them take their place.
CONTINUED = ".continued"
_ELSEWHERE = "this job was continued elsewhere"


def restore(
    store: MirrorStore,
    head: Head,
    folder: RunFolder,
    say: Callable[[str], None],
    damage: str | None = None,
) -> None:
    """Restore a run folder to the latest snapshot; exports are kept.

    Existing records are moved aside unless the snapshot continues them. `damage` says why a damaged folder is
    restored. Raises MirrorError or DeliveryError with the folder unchanged, or MachineError.
    """
    incoming = folder.path / INCOMING
    say(f"restoring job {head.job_id} from {store.uri}: {head.size / 1e6:.1f} MB, generation {head.generation}")
    try:
        shutil.rmtree(incoming, ignore_errors=True)
        make_folder(incoming)
        missing = {path: entry for path, entry in head.files.items() if not _is_there(folder.path, path, entry)}
        download(store, head, missing, incoming)
        _verify(store, head, RunFolder(incoming))
        figures = _make_way(folder, incoming, head, damage, say)
        _move_in(folder.path, incoming, [*missing, *figures])
        shutil.rmtree(incoming, ignore_errors=True)
        shutil.rmtree(folder.path / CONTINUED, ignore_errors=True)
    except OSError as error:
        raise cannot_write(folder.path, error) from error


def _make_way(
    folder: RunFolder, incoming: Path, head: Head, damage: str | None, say: Callable[[str], None]
) -> Sequence[str]:
    """Move the records out of the way of those in `incoming`; return figures that were added to these."""
    former = folder.path / CONTINUED
    if former.exists():  # a restore was cut short there
        former.replace(_new_place(folder.path))
        reached("restore:aside")
    differing, figures = (["all"], []) if damage else unique_records(folder.path, incoming, head.files)
    if differing:
        figures = []
    for path in figures:
        (incoming / path).parent.mkdir(exist_ok=True)
        shutil.copy2(folder.path / path, incoming / path)
    # After a power failure, a rename may survive without the file's contents.
    sync_tree(incoming)
    aside = _move_aside(folder, _new_place(folder.path) if differing else former)
    if aside == former:
        say(f"{_ELSEWHERE}: the run folder now has its latest state, and keeps its own exports")
    elif aside is not None:
        lacking = "" if damage else f", because the checkpoint does not continue its {', '.join(differing[:3])}"
        say(f"warning: {damage or _ELSEWHERE}: the former run folder is now {aside}{lacking}")
    return figures


def download(store: MirrorStore, head: Head, paths: Iterable[str], target: Path) -> None:
    """Download and verify files of a snapshot. Raises MirrorError, DeliveryError, MachineError or OSError."""
    paths = list(paths)
    target.mkdir(parents=True, exist_ok=True)
    _require_room(store, sum(head.files[path].size for path in paths), target)
    for path in paths:
        entry, file = head.files[path], target / path
        file.parent.mkdir(parents=True, exist_ok=True)
        for attempt in range(2):  # a second try distinguishes a bad transfer from a bad object
            try:
                _fetch(store, head, path, file)
            except FileNotFoundError as error:
                raise torn(store.uri, head.job_id, f"the contents of {path} are missing") from error
            except OversizedError as error:
                what = f"the contents of {path} are larger than its {HEAD} says"
                raise torn(store.uri, head.job_id, what) from error
            reached("restore:fetched")
            if sha256_file(file) == entry.sha256:
                break
            if attempt:
                raise torn(store.uri, head.job_id, f"the contents of {path} do not match their hash")


def _require_room(store: MirrorStore, size: int, target: Path, place: str = "choose another --workspace") -> None:
    """Refuse files that do not fit: the head may state any size."""
    disk = shutil.disk_usage(target)
    if size > disk.free and disk.total:  # some network file systems do not report it
        raise MachineError(
            f"{store.uri} holds {size / 1e9:.1f} GB for {target}, where only {disk.free / 1e9:.1f} GB are free",
            remedy=f"free disk space or {place}",
        )


def _fetch(store: MirrorStore, head: Head, path: str, target: Path) -> None:
    """Download a file, unverified. Raises FileNotFoundError or OversizedError for its objects."""
    entry = head.files[path]
    if not isinstance(entry, Layered):
        store.fetch(head.job_id, entry, target)
        return
    with scratch("layers") as folder:
        _require_room(
            store, sum(layer.size for layer in entry.layers), folder, "set TMPDIR to a folder on another disk"
        )
        layers = [folder / str(number) for number in range(len(entry.layers))]
        for file, layer in zip(layers, entry.layers, strict=True):
            store.fetch(head.job_id, layer, file)
            if sha256_file(file) != layer.sha256:
                target.write_bytes(b"")
                return
        try:
            assemble(layers, target, entry.size)
        except ValueError:
            target.write_bytes(b"")


def count_mirrored(store: MirrorStore, head: Head) -> int:
    """Return the latest snapshot's finished trials, 0 if unknown. Raises DeliveryError."""
    if head.trials is not None or STUDY not in head.files:
        return head.trials or 0
    # Of a former version: counted once, then stored in the next head.
    with scratch("study") as folder:
        try:
            download(store, head, [STUDY], folder)
        except MirrorError:
            return 0
        return count_trials(folder / STUDY) or 0


def _is_there(folder: Path, path: str, entry: MirroredFile | Layered) -> bool:
    """Return whether a cached file is already present: it never changes in place."""
    file = folder / path
    if Path(path).parts[0] not in CACHES or not file.is_file() or file.stat().st_size != entry.size:
        return False
    return sha256_file(file) == entry.sha256


def _verify(store: MirrorStore, head: Head, incoming: RunFolder) -> None:
    try:
        if STUDY in head.files:
            check_study(incoming.study_file)
    except MachineError:
        raise
    except JobError as error:
        raise torn(store.uri, head.job_id, str(error).replace(str(incoming.path), "restored")) from error
    prove(store, head, incoming)


def prove(store: MirrorStore, head: Head, folder: RunFolder) -> Mapping[str, Any]:
    """Vet a mirror's job.json in place; return what was dropped. Raises MirrorError or MachineError."""
    try:
        record = read_record(folder.job_file, JobRecord)
        kept, left_out = proven(record, head.job_id)
    except JobError as error:
        raise torn(store.uri, head.job_id, str(error).replace(str(folder.path), "restored")) from error
    if kept != record:
        write_record(folder.job_file, kept)
    return left_out


def _move_aside(folder: RunFolder, aside: Path) -> Path | None:
    """Move existing files to a new folder, job.json first: without it the rest is no job."""
    # Together with its backup, which beside another study would be taken for that one's.
    names = [name for name in reversed((BACKUP, *MIRRORED)) if name not in CACHES and (folder.path / name).exists()]
    if not names:
        return None
    make_folder(aside)
    for name in names:
        (folder.path / name).replace(aside / name)
        reached("restore:aside")
        if name == "job.json":
            sync_folder(folder.path)
    # Together with its journal, which would corrupt another study.
    for journal in folder.path.glob("study.db-*"):
        journal.replace(aside / journal.name)
        reached("restore:journal")
    sync_folder(aside)
    sync_folder(folder.path)
    return aside


def _new_place(folder: Path) -> Path:
    number = 1
    while (aside := folder / f"{SUPERSEDED}-{number}").exists():
        number += 1
    return aside


def _move_in(folder: Path, incoming: Path, paths: Iterable[str]) -> None:
    filled = {folder}
    for path in sorted(paths, key=lambda path: (path == "job.json", path)):
        if path == "job.json":
            for each in filled:
                sync_folder(each)
        target = folder / path
        make_folder(target.parent)
        (incoming / path).replace(target)
        reached("restore:in")
        filled.add(target.parent)
    sync_folder(folder)
