"""The study's file: consistent copies, trial counts, and restoration after damage.

Needs no Optuna, which imports slowly.
"""

from __future__ import annotations

import os
import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from urllib.parse import quote

from job.errors import DamagedError, MachineError
from job.storage.atomic import cannot_write, write_atomically
from job.system.failpoints import reached
from job.system.processes import users_of

# The study as it was after the latest batch, for when the disk has spoilt the other.
BACKUP = ".study.backup.db"
_DAMAGED = "study.damaged.db"
# How the event log, which stands beside the study, tells of a finished trial.
_TOLD = b'"event": "trial"'
# How long another process may keep the study to itself, as dashboards and copies do for a moment.
WAIT_SECONDS = 10.0
_PROBE_BYTES = 1 << 16


@contextmanager
def connected(file: Path) -> Iterator[sqlite3.Connection]:
    """Yield a connection for reading; it may undo a killed process's half write. Raises MachineError if in use."""
    try:
        address = f"file:{quote(str(file.resolve()))}?mode=rw"
        with closing(sqlite3.connect(address, uri=True, timeout=WAIT_SECONDS)) as db:
            require_tables(db)
            yield db
    except sqlite3.OperationalError as error:
        if is_busy(error):
            raise in_use(file) from error
        raise


def require_tables(db: sqlite3.Connection) -> None:
    """Raise sqlite3.DatabaseError for views and triggers: no study has them, and a view may compute without end."""
    found = db.execute("SELECT type, name FROM sqlite_master WHERE type IN ('view', 'trigger')").fetchone()
    if found is not None:
        raise sqlite3.DatabaseError(f"it has a {found[0]}, {found[1]!r}")


def is_busy(error: BaseException) -> bool:
    """Return whether a database could not be used because another process has locked it."""
    # The first byte of SQLite's codes, whose others say more of the same.
    code = getattr(error, "sqlite_errorcode", None)
    return code is not None and code & 0xFF in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)


def in_use(file: Path) -> MachineError:
    """Return the error for a study that another process keeps to itself."""
    return MachineError(
        f"the study {file} is in use by {', '.join(users_of(file)) or 'another process'}",
        remedy="end that process, and run the same command again",
    )


def refused_write(file: Path, error: BaseException) -> MachineError | None:
    """Return the error for a study that the disk refuses to grow; None if it does not.

    SQLite says "disk I/O error" of a used-up quota: a write beside the study tells what the system says.
    """
    code = getattr(error, "sqlite_errorcode", None)
    if code is None or code & 0xFF not in (sqlite3.SQLITE_IOERR, sqlite3.SQLITE_FULL, sqlite3.SQLITE_CANTOPEN):
        return None
    try:
        with tempfile.TemporaryFile(dir=file.parent, buffering=0) as probe:
            probe.write(bytes(_PROBE_BYTES))
            os.fsync(probe.fileno())
    except OSError as refusal:
        return cannot_write(file, refusal)
    return None


def back_up(file: Path, copy: Path, trials: int = 0) -> None:
    """Copy a study as of one moment, even while it is written; the copy is whole or not there.

    No database is opened where the copy is: that file system may know no locks. The study must hold `trials` finished
    trials. Raises sqlite3.Error if it cannot be read, or MachineError, with the former copy left, if it is in use,
    lacks trials, or the copy cannot be written.
    """
    with connected(file) as source, closing(sqlite3.connect(":memory:")) as target:
        source.backup(target)
        if trials and (found := _count_finished(target)) < trials:
            raise MachineError(
                f"the study {file} holds {found} of {trials} finished trials: the file is damaged",
                remedy="run the same command again to restore the study from its backup",
            )
        write_atomically(copy, target.serialize())


def is_sound(file: Path) -> bool:
    """Return whether SQLite finds nothing wrong with a file. Raises MachineError if it is in use."""
    try:
        with connected(file) as db:
            return list(db.execute("PRAGMA quick_check")) == [("ok",)]
    except sqlite3.Error:
        return False


def count_trials(file: Path, *, checked: bool = False) -> int | None:
    """Return the number of a study's finished trials, None if it is missing or damaged.

    `checked` means that it is known to be sound. Raises MachineError if it is in use.
    """
    if not file.exists() or not (checked or is_sound(file)):
        return None
    try:
        with connected(file) as db:
            return _count_finished(db)
    except sqlite3.Error:
        return None


def _count_finished(db: sqlite3.Connection) -> int:
    if not db.execute("SELECT 1 FROM sqlite_master WHERE name = 'trials'").fetchone():
        return 0  # new, or emptied: the caller knows how many there should be
    (found,) = db.execute("SELECT count(*) FROM trials WHERE state = 'COMPLETE'").fetchone()
    return int(found)


def restore_if_damaged(file: Path) -> str | None:
    """Put the latest backup in a damaged study's place; return what was done, or None.

    A study with fewer trials than its backup is damaged, too. Raises DamagedError without a sound backup, or
    MachineError if it is in use, and may be sound.
    """
    saved = require_restorable(file)
    if saved is None:
        return None
    if file.exists():
        file.replace(file.with_name(_DAMAGED))
        reached("study:damaged")
    # What SQLite keeps beside a database belongs to the damaged one.
    for end in ("-journal", "-wal", "-shm"):
        file.with_name(file.name + end).unlink(missing_ok=True)
    back_up(file.with_name(BACKUP), file)
    return f"the study was damaged and is restored with {saved} trials"


def require_restorable(file: Path) -> int | None:
    """Return the trials of the backup that has to replace a damaged study, None for a sound one.

    Raises DamagedError without a sound backup, or MachineError if it is in use.
    """
    backup = file.with_name(BACKUP)
    if not file.exists() and not backup.exists():
        return None
    trials, saved = count_trials(file), count_trials(backup)
    if trials is not None and trials >= (saved or 0) and not _was_emptied(file, saved):
        return None
    if saved is None:
        raise DamagedError(
            f"the study {file} is damaged and has no backup",
            remedy="restore it from a checkpoint, or move the file away to search again from the start",
        )
    return saved


def _was_emptied(file: Path, saved: int | None) -> bool:
    """Return whether an empty study without backup once held trials, by events that a killed creator lacks."""
    if saved is not None or file.stat().st_size:
        return False
    try:
        with file.with_name("events.jsonl").open("rb") as log:
            return any(_TOLD in line for line in log)
    except OSError:
        return False
