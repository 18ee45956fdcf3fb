"""The study's file: consistent copies, trial counts, and restoration after damage.

Needs no Optuna, which imports slowly.
"""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path
from urllib.parse import quote

from job.errors import JobError, MachineError
from job.storage.atomic import write_atomically
from job.system.failpoints import reached

# The study as it was after the latest batch, for when the disk has spoilt the other.
BACKUP = ".study.backup.db"
_DAMAGED = "study.damaged.db"
# How the event log, which stands beside the study, tells of a finished trial.
_TOLD = b'"event": "trial"'


def connected(file: Path) -> sqlite3.Connection:
    """Open a study for reading; writable to roll back a killed process's transaction."""
    return sqlite3.connect(f"file:{quote(str(file.resolve()))}?mode=rw", uri=True)


def back_up(file: Path, copy: Path, trials: int = 0) -> None:
    """Copy a consistent state of a study in use, atomically, to a file system that needs no locks.

    The study must hold `trials` finished trials. Raises sqlite3.Error, or MachineError with the former copy kept.
    """
    with closing(connected(file)) as source, closing(sqlite3.connect(":memory:")) as target:
        source.backup(target)
        if trials and (found := _counted(target)) < trials:
            raise MachineError(
                f"the study {file} holds {found} of {trials} finished trials: its disk has damaged it",
                remedy="run the same command again: the study is restored from its backup",
            )
        write_atomically(copy, target.serialize())


def is_sound(file: Path) -> bool:
    """Return whether a file is an undamaged database."""
    try:
        with closing(connected(file)) as db:
            return list(db.execute("PRAGMA quick_check")) == [("ok",)]
    except sqlite3.Error:
        return False


def count_trials(file: Path, *, checked: bool = False) -> int | None:
    """Return a study's finished trials, None if missing or damaged; `checked` skips the check."""
    if not file.exists() or not (checked or is_sound(file)):
        return None
    try:
        with closing(connected(file)) as db:
            return _counted(db)
    except sqlite3.Error:
        return None


def _counted(db: sqlite3.Connection) -> int:
    if not db.execute("SELECT 1 FROM sqlite_master WHERE name = 'trials'").fetchone():
        return 0  # new, or emptied: the caller knows how many there should be
    (found,) = db.execute("SELECT count(*) FROM trials WHERE state = 'COMPLETE'").fetchone()
    return int(found)


def restore_if_damaged(file: Path) -> str | None:
    """Restore a damaged study, or one with fewer trials, from its backup; return what was done. Raises JobError."""
    backup = file.with_name(BACKUP)
    if not file.exists() and not backup.exists():
        return None
    trials, saved = count_trials(file), count_trials(backup)
    if trials is not None and trials >= (saved or 0) and not _was_emptied(file, saved):
        return None
    if saved is None:
        raise JobError(
            f"the study {file} is damaged and there is no backup of it",
            remedy="restore it from a checkpoint, or move the file away to search again from the start",
        )
    if file.exists():
        file.replace(file.with_name(_DAMAGED))
        reached("study:damaged")
    # What SQLite keeps beside a database belongs to the damaged one.
    for end in ("-journal", "-wal", "-shm"):
        file.with_name(file.name + end).unlink(missing_ok=True)
    back_up(backup, file)
    return f"the study was damaged and is restored as it was after {saved} trials"


def _was_emptied(file: Path, saved: int | None) -> bool:
    """Return whether an empty study without backup once held trials, by events that a killed creator lacks."""
    if saved is not None or file.stat().st_size:
        return False
    try:
        with file.with_name("events.jsonl").open("rb") as log:
            return any(_TOLD in line for line in log)
    except OSError:
        return False
