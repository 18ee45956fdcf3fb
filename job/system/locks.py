"""Locks of folders: the kernel's where the file system has them, else a file that names its owner.

The kernel's lock goes with its process, however that ends. A file stays. So it says who made it, and whoever comes next
can tell whether that one still lives: a process of this boot can be looked for, one of an earlier boot of this host is
gone, and of another host a person has to say. The files are numbered, and the owner of the highest holds the lock. To
take over is to make the next one, which only one can.
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

from job.records import Record
from job.system.processes import ProcessRecord, is_alive, process_namespace, this_process

# What flock answers where the file system has none.
MISSING = frozenset({errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP})
_TAKEN = frozenset({errno.EAGAIN, errno.EWOULDBLOCK, errno.EACCES})
# What link answers where the file system has none.
_NO_LINKS = frozenset({errno.EPERM, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EMLINK})
_POLL_SECONDS = 0.05
_MACHINE = Path("/etc/machine-id")
# Names that many machines have.
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
# Folders of probes, and the file in each that its process has staked.
_TRIAL, _AT_WORK = ".abliterate-probe-", ".at-work"
# Where locks do not tell: no write of a small file and no probe takes as long.
_SURELY_LEFT_SECONDS = 3600.0


class Owner(Record):
    """Who holds a lock by a file, or has held it last.

    Attributes:
        process: The process.
        host: The machine's name.
        machine: The machine's own id, where it has one: names are given twice.
        namespace: Within which the process's id has a meaning.
        released: It has let go.
    """

    process: ProcessRecord
    host: str
    machine: str = ""
    namespace: str = ""
    released: bool = False

    @property
    def is_gone(self) -> bool:
        """Whether it has let go, or is certain to have ended."""
        if self.released:
            return True
        here = this_owner()
        if self.process.boot_id == here.process.boot_id:
            # In another container of this machine ids mean something else.
            return self.namespace == here.namespace and not is_alive(self.process)
        return self.host == here.host and self.machine == here.machine and self.host not in _NO_HOST

    def describe(self) -> str:
        """Return in words who it is."""
        return f"process {self.process.pid} on {self.host}"


def this_owner() -> Owner:
    """Return the record of this process."""
    try:
        machine = _MACHINE.read_text().strip()
    except OSError:
        machine = ""
    return Owner(process=this_process(), host=socket.gethostname(), machine=machine, namespace=process_namespace())


class LockedError(Exception):
    """A lock is held by another: never seen outside.

    Attributes:
        owner: Who holds it; None: the kernel knows, or the file cannot be read.
        file: What stands in for the kernel's lock, None where that is not needed.
    """

    def __init__(self, owner: Owner | None = None, file: Path | None = None) -> None:
        super().__init__("locked")
        self.owner, self.file = owner, file

    @property
    def remedy(self) -> str:
        """What to do."""
        if self.file is None:
            return "wait for it to end or stop it"
        return f"wait for it to end or stop it; if it has ended, remove {self.file}"


class Lock:
    """A lock of one folder; not for several threads.

    Attributes:
        by_file: Whether a file stands in for the kernel's lock, None before it is taken.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._descriptor: int | None = None
        self._mine: Path | None = None
        self.by_file: bool | None = None

    def acquire(self, seconds: float = 0.0) -> None:
        """Take the lock, within so many seconds.

        Raises:
            LockedError: Another holds it.
            OSError: The folder cannot be written.
        """
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
        """Let go; another process that waits goes on."""
        if self._mine is not None:
            mine, self._mine = self._mine, None
            # Not removed: only the next owner may, or an older file would count again.
            try:
                _write(mine, this_owner().model_copy(update={"released": True}), new=False)
            except OSError:
                return  # the disk is full or gone: once this process has ended, that says the same
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
        # A machine that sees the same folder through another mount may lack the kernel's locks.
        if (holder := left_behind(self._file)) is not None:
            os.close(descriptor)
            raise holder
        self._descriptor, self.by_file = descriptor, False


@contextmanager
def locked(file: Path, seconds: float = 0.0) -> Iterator[Lock]:
    """Hold a lock for the block.

    Raises:
        LockedError: Another holds it.
        OSError: The folder cannot be written.
    """
    lock = Lock(file)
    lock.acquire(seconds)
    try:
        yield lock
    finally:
        lock.release()


def stake(descriptor: int) -> None:
    """Have others see that this process is at work on a file, where the file system knows locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return  # where it knows none, what is left is told by its age


def is_left(file: Path, since: float) -> bool:
    """Return whether the process that was at work on a file has ended.

    Args:
        file: The file, on which that process has put a stake.
        since: When this process began, by the clock of the file system: what is younger may be about to be staked.
    """
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
    """Make a folder for a probe and remove it after the block, with those that killed processes have left.

    Raises:
        OSError: The place cannot be written.
    """
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
            continue  # it is somebody else's, or gone
        if is_left(other / _AT_WORK, since) if staked else old:
            shutil.rmtree(other, ignore_errors=True)


def is_locked(file: Path) -> bool:
    """Return whether somebody holds a lock now; nothing is made where there is none."""
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
    """Return whether another process is kept out by a lock at a path; None where it cannot tell.

    Args:
        held: The lock's file, possibly seen through another mount.
    """
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
    """Return the files that stand in for a lock, by their numbers."""
    prefix = f"{file.name}.owner-"
    found = {}
    for path in file.parent.iterdir():
        number = path.name.removeprefix(prefix)
        if path.name.startswith(prefix) and number.isascii() and number.isdigit():
            found[int(number)] = path
    return found


def left_behind(file: Path) -> LockedError | None:
    """Return who holds a lock by a file, as far as can be told; None if nobody does."""
    owners = _owners(file)
    if not owners:
        return None
    path = owners[max(owners)]
    try:
        owner = Owner.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return left_behind(file)  # somebody has just taken over
    except (OSError, ValidationError):
        return LockedError(None, path)
    return None if owner.is_gone else LockedError(owner, path)


def _take(file: Path) -> Path:
    """Make the file that holds the lock.

    Raises:
        LockedError: Another holds it, or was quicker.
        OSError: The folder cannot be written.
    """
    if (holder := left_behind(file)) is not None:
        raise holder
    number = max(_owners(file), default=0) + 1
    mine = file.with_name(f"{file.name}.owner-{number}")
    try:
        _write(mine, this_owner(), new=True)
    except FileExistsError as error:
        raise (left_behind(file) or LockedError(None, mine)) from error
    owners = _owners(file)
    if max(owners) != number:
        # Made after the one that came next had removed it: that one holds the lock.
        mine.unlink(missing_ok=True)
        raise LockedError(None, owners[max(owners)])
    for former, path in owners.items():
        if former < number:
            path.unlink(missing_ok=True)
    return mine


def _write(path: Path, owner: Owner, *, new: bool) -> None:
    """Write an owner's record so that nobody reads half of it.

    Raises:
        FileExistsError: It is to be new and is there.
    """
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
