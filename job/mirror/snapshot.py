"""A consistent snapshot of a run folder, taken while the run goes on."""

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
from job.storage.study_file import count_trials
from job.system.failpoints import reached

# Copies of what may change while it is sent; the dot keeps them out of mirrors.
STAGING = ".mirror"
_BUSY_SECONDS = 10.0
# A file that has changed within this time may change again without its time of change showing it.
_COARSE_NS = 2_000_000_000
_BLOCK = 1 << 20

Signature = tuple[int, int, int]


@dataclass(frozen=True)
class Taken:
    """A file of a snapshot.

    Attributes:
        sha256: Of its contents.
        size: Bytes.
        source: Where the contents are to be read; None: they are known already.
        trials: Finished trials, of a study that was copied; None: unknown.
    """

    sha256: str
    size: int
    source: Path | None
    trials: int | None = None


def mirrored_files(folder: Path) -> Iterator[Path]:
    """Yield the files of a run folder that belong into a mirror, those that depend on others first."""
    for name in MIRRORED:
        root = folder / name
        if root.is_file():
            yield root
        elif root.is_dir():
            found = sorted(path for path in root.rglob("*") if path.is_file())
            yield from (p for p in found if not any(part.startswith(".") for part in p.relative_to(folder).parts))


def held_bytes(folder: RunFolder) -> int:
    """Return the size in bytes of what a mirror of a run folder would hold now."""
    return sum(path.stat().st_size for path in mirrored_files(folder.path))


class Snapshots:
    """Takes snapshots of one run folder; files that have not changed are not read again."""

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder
        self._staging = folder.path / STAGING
        self._known: dict[Path, tuple[Signature, str]] = {}

    def take(self, have: Collection[str]) -> dict[str, Taken]:
        """Return the files of a snapshot by their paths in the run folder.

        Args:
            have: sha256 of contents that need no source.

        Raises:
            JobError: The study is damaged.
            OSError: A file cannot be read or copied.
        """
        shutil.rmtree(self._staging, ignore_errors=True)
        self._staging.mkdir()
        found = {}
        for number, path in enumerate(mirrored_files(self._folder.path)):
            try:
                found[path.relative_to(self._folder.path).as_posix()] = self._file(path, number, have)
            except FileNotFoundError:
                continue  # gone since it was listed
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
            # Large, and never changed in place: a copy would cost as much disk again.
            source, sha256 = path, sha256_file(path)
        else:
            source = self._staging / str(number)
            sha256 = _copy(path, source, before.st_size)
        if time.time_ns() - before.st_mtime_ns > _COARSE_NS:
            self._known[path] = (signature, sha256)
        return Taken(sha256, source.stat().st_size, None if sha256 in have else source, trials)


def back_up(file: Path, target: Path) -> None:
    """Copy a study as it is at one moment, while others may be writing to it.

    Raises:
        JobError: It is damaged, or stays locked.
    """
    try:
        # Not for reading only: what a killed process has left half-written has to be taken back first.
        address = f"file:{quote(str(file.resolve()))}?mode=rw"
        with (
            closing(sqlite3.connect(address, uri=True, timeout=_BUSY_SECONDS)) as source,
            closing(sqlite3.connect(target)) as copy,
        ):
            # Waits for a writer, within bounds, and holds the next one back: on its own a backup may wait for ever.
            source.execute("BEGIN")
            source.execute("SELECT count(*) FROM sqlite_master").fetchone()
            source.backup(copy)
    except sqlite3.Error as error:
        raise JobError(f"the study {file} cannot be copied: {error}", remedy="see whether its disk is sound") from error
    check_study(target)


def check_study(file: Path) -> None:
    """Check that a study is whole.

    Raises:
        JobError: It is not.
    """
    try:
        with closing(sqlite3.connect(f"file:{quote(str(file.resolve()))}?mode=ro", uri=True)) as db:
            (said,) = db.execute("PRAGMA integrity_check").fetchone()
    except sqlite3.Error as error:
        said = str(error)
    if said != "ok":
        raise JobError(f"the study {file} is damaged: {said}", remedy="see whether its disk is sound")


def _copy(source: Path, target: Path, size: int) -> str:
    """Copy the first bytes of a file, which may be growing, and return their sha256."""
    digest = hashlib.sha256()
    with source.open("rb") as reading, target.open("wb") as writing:
        while block := reading.read(min(_BLOCK, size - writing.tell())):
            digest.update(block)
            writing.write(block)
    return digest.hexdigest()
