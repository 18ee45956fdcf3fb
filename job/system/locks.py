"""Locks of folders: by flock where supported, else by a file that names its owner.

The kernel releases flock with its process; a file stays. So it identifies its owner: a process of this boot can be
checked, one of an earlier boot of this host is dead, and one of another host needs a person's decision. Files are
numbered, and the highest owner holds the lock. Taking over creates the next file, which only one process can.
"""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pydantic import ValidationError

from job.system.processes import HolderRecord, is_alive, process_namespace, this_process

# Errors of flock on file systems without it.
MISSING = frozenset({errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP})
_TAKEN = frozenset({errno.EAGAIN, errno.EWOULDBLOCK, errno.EACCES})
# Errors of link on file systems without it.
_NO_LINKS = frozenset({errno.EPERM, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EMLINK})
_POLL_SECONDS = 0.05
_MACHINE = Path("/etc/machine-id")
# Host names shared by many machines.
_NO_HOST = frozenset({"", "localhost", "localhost.localdomain"})
_ASK = """
import fcntl, os, sys
descriptor = os.open(sys.argv[1], os.O_RDWR)
try:
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
except BlockingIOError:
    sys.exit(3)
"""
_ASK_SECONDS = 30.0
# Folders of probes, and the file in each that its process has locked.
_TRIAL, _AT_WORK = ".abliterate-probe-", ".at-work"
# Without locks: no small write or probe takes this long.
_SURELY_LEFT_SECONDS = 3600.0


class Owner(HolderRecord):
    """The current or last holder of a file lock.

    Attributes:
        machine: The machine's id if it has one: names are not unique.
        namespace: PID namespace of the process.
    """

    machine: str = ""
    namespace: str = ""
    released: bool = False

    @property
    def is_gone(self) -> bool:
        """Whether it has released the lock, or certainly ended."""
        if self.released:
            return True
        here = this_owner()
        if self.process.boot_id == here.process.boot_id:
            # Another container of this machine has other process ids.
            return self.namespace == here.namespace and not is_alive(self.process)
        return self.host == here.host and self.machine == here.machine and self.host not in _NO_HOST


def this_owner() -> Owner:
    """Return the record of this process."""
    try:
        machine = _MACHINE.read_text().strip()
    except OSError:
        machine = ""
    return Owner(process=this_process(), host=socket.gethostname(), machine=machine, namespace=process_namespace())


class LockedError(Exception):
    """A lock is held by another process. Internal.

    Attributes:
        owner: The holder; None if only the kernel knows, or the file is unreadable.
        file: The lock file, None with flock.
    """

    def __init__(self, owner: Owner | None = None, file: Path | None = None) -> None:
        super().__init__("locked")
        self.owner, self.file = owner, file

    @property
    def remedy(self) -> str:
        """The remedy for the user."""
        if self.file is None:
            return "wait for it to end or stop it"
        return f"wait for it to end or stop it; if it has ended, remove {self.file}"


class Lock:
    """A lock of one folder; not thread-safe.

    `by_file` says whether a file replaces flock, None before it is taken.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._descriptor: int | None = None
        self._mine: Path | None = None
        self.by_file: bool | None = None

    def acquire(self, seconds: float = 0.0) -> None:
        """Take the lock within `seconds`. Raises LockedError, or OSError if the folder cannot be written."""
        end = time.monotonic() + seconds
        while True:
            try:
                self._try()
            except LockedError:
                if time.monotonic() >= end:
                    raise
                time.sleep(_POLL_SECONDS)
            else:
                return

    def release(self) -> None:
        """Release the lock."""
        if self._mine is not None:
            mine, self._mine = self._mine, None
            # Kept: only the next owner may remove it, or an older file would count again.
            try:
                _write(mine, this_owner().model_copy(update={"released": True}), new=False)
            except OSError:
                return  # the disk is full or gone: the end of this process releases it too
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _try(self) -> None:
        descriptor = _opened(self._file)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(descriptor)
            if error.errno in _TAKEN:
                raise LockedError from error
            if error.errno not in MISSING:
                raise
            self._mine, self.by_file = _take(self._file), True
            return
        # A machine that mounts the folder differently may lack flock.
        if (holder := left_behind(self._file)) is not None:
            os.close(descriptor)
            raise holder
        self._descriptor, self.by_file = descriptor, False


@contextmanager
def locked(file: Path, seconds: float = 0.0) -> Iterator[Lock]:
    """Hold a lock for the block. Raises LockedError, or OSError if the folder cannot be written."""
    lock = Lock(file)
    lock.acquire(seconds)
    try:
        yield lock
    finally:
        lock.release()


def stake(descriptor: int) -> None:
    """Lock a file that this process works on, where the file system has locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return  # without locks, only its age tells


def is_left(file: Path, since: float) -> bool:
    """Return whether a file's process has ended, unless the file is younger than `since`."""
    try:
        descriptor = os.open(file, os.O_RDWR | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        age = since - os.fstat(descriptor).st_mtime
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in _TAKEN and age > _SURELY_LEFT_SECONDS
    finally:
        os.close(descriptor)
    return age > 0


@contextmanager
def trial_folder(place: Path) -> Iterator[Path]:
    """Create a probe folder for the block, removing leftovers of killed processes. Raises OSError."""
    folder = place / f"{_TRIAL}{secrets.token_hex(8)}"
    folder.mkdir()
    try:
        _sweep_trials(place, folder)
        with (folder / _AT_WORK).open("wb") as file:
            stake(file.fileno())
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _sweep_trials(place: Path, mine: Path) -> None:
    since = mine.stat().st_mtime
    for other in place.glob(f"{_TRIAL}*"):
        if other == mine or other.is_symlink():
            continue
        try:
            staked = (other / _AT_WORK).exists()
            old = since - other.stat().st_mtime > _SURELY_LEFT_SECONDS
        except OSError:
            continue  # someone else's, or gone
        if is_left(other / _AT_WORK, since) if staked else old:
            shutil.rmtree(other, ignore_errors=True)


def is_locked(file: Path) -> bool:
    """Return whether a lock is held now, without creating it."""
    if not file.exists():
        return False
    try:
        descriptor = _opened(file)
    except OSError:
        return left_behind(file) is not None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _TAKEN:
            return True
    finally:
        os.close(descriptor)
    return left_behind(file) is not None


def keeps_others_out(held: Path) -> bool | None:
    """Return whether a lock, possibly at another mount, excludes another process; None if unknown."""
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", _ASK, str(held)], capture_output=True, timeout=_ASK_SECONDS
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return {0: False, 3: True}.get(done.returncode)


def _opened(file: Path) -> int:
    try:
        return os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
    except PermissionError:
        return os.open(file, os.O_RDONLY)


def _owners(file: Path) -> dict[int, Path]:
    prefix = f"{file.name}.owner-"
    found = {}
    for path in file.parent.iterdir():
        number = path.name.removeprefix(prefix)
        if path.name.startswith(prefix) and number.isascii() and number.isdigit():
            found[int(number)] = path
    return found


def left_behind(file: Path) -> LockedError | None:
    """Return the known holder of a file lock, None without one."""
    owners = _owners(file)
    if not owners:
        return None
    path = owners[max(owners)]
    try:
        owner = Owner.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return left_behind(file)  # another process has just taken over
    except (OSError, ValidationError):
        return LockedError(None, path)
    return None if owner.is_gone else LockedError(owner, path)


def _take(file: Path) -> Path:
    """Create the next owner file. Raises LockedError if another holds it or was faster, or OSError."""
    # Before looking at the holder: a number above that of a process that takes over in between would be free.
    number = max(_owners(file), default=0) + 1
    if (holder := left_behind(file)) is not None:
        raise holder
    mine = file.with_name(f"{file.name}.owner-{number}")
    try:
        _write(mine, this_owner(), new=True)
    except FileExistsError as error:
        raise (left_behind(file) or LockedError(None, mine)) from error
    owners = _owners(file)
    if max(owners) != number:
        # Created after its successor had removed it: the successor holds the lock.
        mine.unlink(missing_ok=True)
        raise LockedError(None, owners[max(owners)])
    for former, path in owners.items():
        if former < number:
            path.unlink(missing_ok=True)
    return mine


def _write(path: Path, owner: Owner, *, new: bool) -> None:
    """Write an owner's record atomically. Raises FileExistsError if it is `new` and the path exists."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    data = owner.model_dump_json().encode()
    try:
        temporary.write_bytes(data)
        if not new:
            temporary.replace(path)
            return
        try:
            os.link(temporary, path)
        except FileExistsError:
            raise
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            with path.open("xb") as file:
                file.write(data)
    finally:
        temporary.unlink(missing_ok=True)
