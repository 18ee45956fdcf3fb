"""Consistent snapshots of a run folder during a run."""

from __future__ import annotations

import hashlib
import shutil
import sqlite3
import time
from collections.abc import Collection, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from job.errors import JobError
from job.mirror.records import CACHES, MIRRORED
from job.storage.atomic import sha256_file
from job.storage.run_folder import RunFolder
from job.storage.study_file import WAIT_SECONDS, count_trials, in_use, is_busy, require_tables
from job.system.failpoints import reached

# Copies of files that may change during upload; hidden, so never mirrored.
STAGING = ".mirror"
# A file changed within this time may change again with the same modification time.
_COARSE_NS = 2_000_000_000
_BLOCK = 1 << 20

Signature = tuple[int, int, int]


@dataclass(frozen=True)
class Taken:
    """A file of a snapshot.

    Attributes:
        source: Where to read it; None if already mirrored.
        trials: Finished trials of a copied study; None: unknown.
    """

    sha256: str
    size: int
    source: Path | None
    trials: int | None = None


def mirrored_files(folder: Path) -> Iterator[Path]:
    """Yield a run folder's mirrored files, dependent ones first."""
    for name in MIRRORED:
        root = folder / name
        if root.is_file():
            yield root
        elif root.is_dir():
            found = sorted(path for path in root.rglob("*") if path.is_file())
            yield from (p for p in found if not any(part.startswith(".") for part in p.relative_to(folder).parts))


def held_bytes(folder: RunFolder) -> int:
    """Return the bytes that a mirror of a run folder would hold now."""
    return sum(path.stat().st_size for path in mirrored_files(folder.path))


class Snapshots:
    """Takes snapshots of one run folder; unchanged files are not read again."""

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder
        self._staging = folder.path / STAGING
        self._known: dict[Path, tuple[Signature, str]] = {}

    def take(self, have: Collection[str]) -> dict[str, Taken]:
        """Return a snapshot's files by path; SHA-256s in `have` need no source. Raises JobError or OSError."""
        shutil.rmtree(self._staging, ignore_errors=True)
        self._staging.mkdir()
        found = {}
        for number, path in enumerate(mirrored_files(self._folder.path)):
            try:
                found[path.relative_to(self._folder.path).as_posix()] = self._file(path, number, have)
            except FileNotFoundError:
                continue  # removed since it was listed
        reached("snapshot:taken")
        return found

    def clear(self) -> None:
        """Remove the copies."""
        shutil.rmtree(self._staging, ignore_errors=True)

    def _file(self, path: Path, number: int, have: Collection[str]) -> Taken:
        before, trials = path.stat(), None
        signature = (before.st_size, before.st_mtime_ns, before.st_ino)
        known, sha256 = self._known.get(path, (None, ""))
        if known == signature and sha256 in have:
            return Taken(sha256, before.st_size, None)
        if path == self._folder.study_file:
            source = self._staging / str(number)
            back_up(path, source)
            sha256, trials = sha256_file(source), count_trials(source, checked=True)
        elif path.suffix == ".safetensors" and path.relative_to(self._folder.path).parts[0] in CACHES:
            # Large and immutable: a copy would double the disk space.
            source, sha256 = path, sha256_file(path)
        else:
            source = self._staging / str(number)
            sha256 = _copy(path, source, before.st_size)
        if time.time_ns() - before.st_mtime_ns > _COARSE_NS:
            self._known[path] = (signature, sha256)
        return Taken(sha256, source.stat().st_size, None if sha256 in have else source, trials)


def back_up(file: Path, target: Path) -> None:
    """Copy a study as of one moment, even while it is written. Raises JobError if damaged, MachineError if in use."""
    try:
        # Writable: leftovers of a killed process must be rolled back first.
        address = f"file:{quote(str(file.resolve()))}?mode=rw"
        with (
            closing(sqlite3.connect(address, uri=True, timeout=WAIT_SECONDS)) as source,
            closing(sqlite3.connect(target)) as copy,
        ):
            # Waits for a writer, within bounds, and blocks the next: a bare backup may wait forever.
            source.execute("BEGIN")
            source.execute("SELECT count(*) FROM sqlite_master").fetchone()
            source.backup(copy)
    except sqlite3.Error as error:
        if is_busy(error):
            raise in_use(file) from error
        raise JobError(f"the study {file} cannot be copied: {error}", remedy="check the disk") from error
    check_study(target)


def check_study(file: Path) -> None:
    """Raise JobError if a study is damaged."""
    try:
        with closing(sqlite3.connect(f"file:{quote(str(file.resolve()))}?mode=ro", uri=True)) as db:
            (said,) = db.execute("PRAGMA integrity_check").fetchone()
            require_tables(db)
    except sqlite3.Error as error:
        said = str(error)
    if said != "ok":
        raise JobError(f"the study {file} is damaged: {said}", remedy="check the disk")


def _copy(source: Path, target: Path, size: int) -> str:
    """Copy the first `size` bytes of a growing file; return their SHA-256."""
    digest = hashlib.sha256()
    with source.open("rb") as reading, target.open("wb") as writing:
        while block := reading.read(min(_BLOCK, size - writing.tell())):
            digest.update(block)
            writing.write(block)
    return digest.hexdigest()
