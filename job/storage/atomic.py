"""Durable files, replaced atomically; records as JSON."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import secrets
import shutil
from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError

from job.errors import DamagedError, MachineError, first_line
from job.records import Record
from job.system.failpoints import reached
from job.system.locks import is_left, stake

# What fsync of a folder answers where the file system has none.
_NO_SYNC = frozenset({errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP})

# Of what only the owner may read.
PRIVATE = 0o600

R = TypeVar("R", bound=Record)


def write_atomically(path: Path, data: bytes, *, mode: int | None = None) -> None:
    """Replace a file's contents atomically and durably; `mode` sets its permissions. Raises MachineError."""
    # Not by the process id: in two containers that share a disk both may be process 1.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("wb") as file:
            stake(file.fileno())  # until it has its name
            if mode is not None:
                os.fchmod(file.fileno(), mode)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            reached(f"written:{path.name}")  # the next point finds what is there after the next line
            temporary.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise cannot_write(path, error) from error


def sync_folder(folder: Path) -> None:
    """Make renames and new files in a folder durable, as far as the file system supports it."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network and FUSE file systems sync files alone. A file that cannot be synced stays an error.
        if error.errno not in _NO_SYNC:
            raise
    finally:
        os.close(descriptor)


def sync_file(file: Path) -> None:
    """Make a file's contents durable."""
    with file.open("rb") as opened:
        os.fsync(opened.fileno())


def sync_tree(folder: Path) -> None:
    """Make a folder and its contents durable, before it is renamed."""
    for path in folder.rglob("*"):
        if path.is_symlink():
            continue
        if path.is_dir():
            sync_folder(path)
        elif path.is_file():
            sync_file(path)
    sync_folder(folder)


def make_folder(folder: Path) -> None:
    """Create a folder, or the one that a link to none names, and missing parents durably. Raises OSError."""
    folder = Path(os.path.realpath(folder))
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in missing:
        sync_folder(path.parent)


def ensure_folder(folder: Path) -> None:
    """Create a folder as `make_folder` does. Raises MachineError."""
    try:
        make_folder(folder)
    except OSError as error:
        raise cannot_write(folder, error) from error


def cannot_write(path: Path, error: OSError) -> MachineError:
    """Return the error for a file or folder that cannot be written: it names the folder and the space left there."""
    reason = str(error.strerror or error)
    remedy = "free disk space, correct its permissions or choose another --workspace"
    if error.errno == errno.EDQUOT:
        remedy = "remove files there, have the quota raised or choose another --workspace"
    elif error.errno == errno.EISDIR:
        remedy = "remove the folder that has the file's name"
    elif error.errno == errno.ENOSPC:
        there = next(folder for folder in path.absolute().parents if folder.exists())
        reason += f" ({shutil.disk_usage(there).free / 2**20:.1f} MiB left in {there})"
        remedy = "free disk space or choose another --workspace"
    return MachineError(f"cannot write {path}: {reason}", remedy=remedy)


def cannot_read(path: Path, error: Exception, *, remedy: str = "") -> DamagedError:
    """Return the error for a file of a run folder that cannot be read; the default remedy does for any of them."""
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        reason = " ".join([*(str(part) for part in first["loc"]), first["msg"]])
    else:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else first_line(error)
    return DamagedError(
        f"{path} cannot be read: {reason}",
        remedy=remedy or "restore it from a copy or a checkpoint, or move its run folder away to start the job again",
    )


def sha256_file(path: Path) -> str:
    """Return the sha256 of a file's contents."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_record(path: Path, record: Record, *, mode: int | None = None) -> None:
    """Write a record as JSON, atomically, with these permissions or the default ones."""
    write_atomically(path, (record.model_dump_json(indent=2) + "\n").encode(), mode=mode)


def read_record(path: Path, kind: type[R], *, remedy: str = "") -> R:
    """Read a record. Raises DamagedError, with this remedy or the usual one, if the file is damaged or missing."""
    try:
        return kind.model_validate_json(path.read_bytes())
    except (ValidationError, OSError) as error:
        raise cannot_read(path, error, remedy=remedy) from error


_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{8}\.tmp")


def sweep_temporaries(folder: Path, since: float, *, below: bool = False) -> None:
    """Remove leftovers of `write_atomically` in processes killed before `since` (file system's clock)."""
    for root, _, names in os.walk(folder):
        for name in filter(_TEMPORARY.fullmatch, names):
            file = Path(root, name)
            try:
                if is_left(file, since):
                    file.unlink(missing_ok=True)
            except OSError:
                continue  # it is somebody else's
        if not below:
            break
