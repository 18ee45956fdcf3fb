"""Mirrors in a folder on another disk or a network file system."""

from __future__ import annotations

import hashlib
import os
import secrets
import stat
from collections.abc import Callable, Collection, Iterator, Mapping
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from pathlib import Path

from job.errors import DeliveryError, JobError
from job.mirror.options import SnapshotPace
from job.mirror.records import HEAD, MOST_HEAD_BYTES, OBJECTS, MirroredFile, foreign, oversized_head
from job.mirror.store import ConflictError, OversizedError, Proof, Stored
from job.storage.atomic import make_folder, sweep_temporaries, sync_folder, write_atomically
from job.system.failpoints import reached
from job.system.locks import Lock, LockedError, is_left, keeps_others_out, locked, trial_folder
from job.transfer.folders import target_folder

_LOCK = ".lock"
_LOCK_SECONDS = 10.0
_BLOCK = 1 << 20


class FileStore:
    """Mirrors in a folder; heads are compared and replaced under a lock bound to the process."""

    def __init__(self, uri: str, pace: SnapshotPace | None = None) -> None:
        self.uri = uri
        self.pace = pace or SnapshotPace()
        self._root = target_folder(uri)

    def close(self) -> None:
        """Do nothing."""

    def probe(self) -> Proof:
        """Write, rename, lock and delete in the folder, or its nearest existing parent."""
        place = self._root
        while not os.path.lexists(place):
            place = place.parent
        with self._clear_errors(self._root), trial_folder(place) as trial:
            write_atomically(trial / HEAD, b"a probe, to be deleted at once\n")
            quirk = _lock_quirk(trial / _LOCK)
        if quirk is not None:
            return Proof("files can be written and deleted", fenced=False, quirks=(quirk,))
        return Proof("files can be written, locked and deleted", fenced=True)

    def prepare(self) -> None:
        """Make the folder."""
        with self._clear_errors(self._root):
            make_folder(self._root)

    def jobs(self) -> list[str]:
        """Return the jobs with a head."""
        with self._clear_errors(self._root):
            if not self._root.exists():
                return []
            return sorted(path.name for path in self._root.iterdir() if (path / HEAD).is_file())

    def _folder(self, job: str) -> Path:
        """Return a job's folder. Raises MirrorError if it is a link, through which files elsewhere would be changed."""
        folder = self._root / job
        if link := next((path for path in (folder, folder / OBJECTS) if path.is_symlink()), None):
            raise foreign(self.uri, job, [f"{link.relative_to(self._root)}, which is a link"])
        return folder

    def read(self, job: str) -> Stored | None:
        """Return the head and its age by the file system's clock."""
        file = self._root / job / HEAD
        with self._clear_errors(file):
            try:
                if not stat.S_ISREG(file.stat().st_mode):
                    return None  # reading a pipe would block forever
                with file.open("rb") as opened:
                    status = os.fstat(opened.fileno())
                    if status.st_size > MOST_HEAD_BYTES:
                        raise oversized_head(self.uri, job)
                    data = opened.read(status.st_size + 1)  # heads are replaced, never extended
            except (FileNotFoundError, NotADirectoryError):
                return None
        return Stored(data, hashlib.sha256(data).hexdigest(), self._age(file.parent, status.st_mtime))

    def _age(self, folder: Path, written: float) -> float | None:
        trial = folder / f".clock-{secrets.token_hex(8)}"
        try:
            trial.touch()
            now = trial.stat().st_mtime
            trial.unlink()
        except OSError:
            return None
        return max(now - written, 0.0)

    def names(self, job: str) -> list[str]:
        """Return all files except the head and hidden ones."""
        folder = self._folder(job)
        with self._clear_errors(folder):
            files = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
        return sorted(str(p) for p in files if str(p) != HEAD and not any(part.startswith(".") for part in p.parts))

    def stage(self, job: str, objects: Mapping[str, tuple[Path, MirroredFile]], check: Callable[[], None]) -> None:
        """Copy objects, each atomically."""
        folder = self._folder(job) / OBJECTS
        with self._clear_errors(folder):
            make_folder(folder)
            for name, (source, entry) in objects.items():
                if (folder / name).exists():
                    continue  # from an earlier try: a name determines the contents
                check()
                temporary = folder / f".{name}.tmp"
                temporary.unlink(missing_ok=True)  # of a killed copy, or a link
                if _copy(source, temporary) != entry.sha256:
                    temporary.unlink()
                    raise DeliveryError(
                        f"{source.name} changed during the copy", remedy="the next snapshot copies it again"
                    )
                reached("object:copied")
                temporary.replace(folder / name)
                reached("object:replaced")
            sync_folder(folder)

    def replace(self, job: str, data: bytes, expected: Stored | None, remove: Collection[str]) -> Stored:
        """Replace the head under the lock."""
        folder = self._folder(job)
        with self._clear_errors(folder):
            make_folder(folder)
            with self._locked(folder):
                found = self.read(job)
                if (found and found.token) != (expected and expected.token):
                    raise ConflictError(found)
                write_atomically(folder / HEAD, data)
            for name in remove:
                (folder / OBJECTS / name).unlink(missing_ok=True)
        return Stored(data, hashlib.sha256(data).hexdigest(), 0.0)

    @contextmanager
    def _locked(self, folder: Path) -> Iterator[None]:
        lock = Lock(folder / _LOCK)
        try:
            lock.acquire(_LOCK_SECONDS)
        except LockedError as error:
            who = f" by {error.owner.describe()}" if error.owner else ""
            raise DeliveryError(f"{folder} stays locked{who}", remedy=error.remedy) from None
        try:
            yield
        finally:
            lock.release()

    def sweep(self, job: str, keep: AbstractSet[str]) -> None:
        """Remove unreferenced and partial objects, and leftovers of killed processes beside the head."""
        folder = self._folder(job) / OBJECTS
        with self._clear_errors(folder):
            since = (folder.parent / HEAD).stat().st_mtime
            sweep_temporaries(folder.parent, since)
            for clock in folder.parent.glob(".clock-*"):
                if is_left(clock, since):
                    clock.unlink(missing_ok=True)
            for path in folder.iterdir() if folder.is_dir() else ():
                if path.name not in keep:
                    path.unlink(missing_ok=True)

    def fetch(self, job: str, entry: MirroredFile, target: Path) -> None:
        """Copy an object up to its recorded size; links and devices are rejected."""
        source = self._folder(job) / OBJECTS / entry.object
        if not stat.S_ISREG(source.lstat().st_mode):
            raise FileNotFoundError(source)
        left = entry.size
        with source.open("rb") as reading, target.open("wb") as writing:
            if os.fstat(reading.fileno()).st_size > left:
                raise OversizedError
            while left and (block := reading.read(min(_BLOCK, left))):
                writing.write(block)
                left -= len(block)
            if reading.read(1):  # it has grown since
                raise OversizedError

    @contextmanager
    def _clear_errors(self, path: Path) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise _failed(self.uri, path, error.strerror or str(error)) from error
        except DeliveryError:
            raise
        except JobError as error:  # from write_atomically: this folder is not the workspace
            raise DeliveryError(str(error), remedy="free space or correct its permissions") from error


def _lock_quirk(file: Path) -> str | None:
    """Return why a lock does not exclude other processes of this machine, None if it does."""
    with locked(file, _LOCK_SECONDS) as lock:
        if lock.by_file:
            return "this file system has no locks (flock); lock files are used instead"
        kept_out = keeps_others_out(file)
    if not kept_out or keeps_others_out(file) is not False:
        return "a lock here does not keep out another process"
    return None


def _copy(source: Path, target: Path) -> str:
    digest = hashlib.sha256()
    with source.open("rb") as reading, target.open("wb") as writing:
        while block := reading.read(_BLOCK):
            digest.update(block)
            writing.write(block)
        writing.flush()
        os.fsync(writing.fileno())
    return digest.hexdigest()


def _failed(uri: str, path: Path, what: str) -> DeliveryError:
    return DeliveryError(
        f"the checkpoint {uri} cannot be used: {path}: {what}",
        remedy="mount it, free space or correct its permissions, and run again",
    )
