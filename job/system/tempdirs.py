"""Temporary folders that a killed process does not leave behind for good.

A process holds a lock on each of its folders, which ends with it however it ends. Who makes a folder first removes
those of its kind that nobody holds: weights that are kept on disk would otherwise fill it, kill by kill.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def scratch(kind: str) -> Iterator[Path]:
    """Yield a new temporary folder, which is removed afterwards.

    Args:
        kind: What it is for; a part of its name.
    """
    prefix = f"abliterate-{kind}-"
    for left in Path(tempfile.gettempdir()).glob(f"{prefix}*"):
        _remove_if_left(left)
    folder, lock = _made(prefix)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _made(prefix: str) -> tuple[Path, int]:
    while True:
        folder = Path(tempfile.mkdtemp(prefix=prefix))
        try:
            lock = os.open(folder, os.O_RDONLY)
        except FileNotFoundError:
            continue  # taken for one that was left, before the lock was had
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError:
            return folder, lock  # a file system without locks: whoever looks cannot lock it either, and leaves it alone
        if folder.exists():
            return folder, lock
        os.close(lock)


def _remove_if_left(folder: Path) -> None:
    try:
        lock = os.open(folder, os.O_RDONLY | os.O_NOFOLLOW | os.O_DIRECTORY)
    except OSError:
        return  # gone, no folder, or another user's
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return  # somebody's
    else:
        shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(lock)
