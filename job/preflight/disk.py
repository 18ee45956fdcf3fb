"""Disks: space, inodes, file system, permissions and speed of every mount involved."""

from __future__ import annotations

import fcntl
import os
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from job.preflight.checks import MIB, Check, size, speed
from job.preflight.mounts import Mount, kind_of, mount_of, nearest_existing, read_mounts
from job.records import Record
from job.system.locks import MISSING

# Room kept free beyond what is known to be needed: a share of it, and something for logs and the study.
MARGIN_SHARE = 0.05
MARGIN_BYTES = 256 * MIB
MARGIN_FILES = 200
# A disk slower than this makes loading and export the longest phases: 65 GB at 40 MB/s are 27 minutes.
SLOWEST_WRITE = 40e6
SLOWEST_READ = 40e6
_PROBE_BYTES = 64 * MIB
_PROBE_SECONDS = 1.0
_BLOCK = 4 * MIB
_BY_FILE = "has no flock: a file that names its owner locks the job, and stays if that machine dies"


class DiskNeed(Record):
    """A planned write.

    Attributes:
        database: A SQLite database, which needs locks and in-place writes.
        keep: It must outlive this container or instance.
    """

    path: Path
    bytes: int
    what: str
    files: int = 10
    database: bool = False
    keep: bool = False


class DiskSpeed(Record):
    """Measured rates, bytes per second."""

    write: float
    read: float


def by_mount(needs: Iterable[DiskNeed]) -> list[tuple[Mount, list[DiskNeed]]]:
    """Group needs by file system; mounts of one share its space."""
    mounts = read_mounts()
    grouped: dict[str, tuple[Mount, list[DiskNeed]]] = {}
    for need in needs:
        mount = mount_of(need.path, mounts)
        grouped.setdefault(mount.device, (mount, []))[1].append(need)
    return list(grouped.values())


def disk_checks(
    needs: Sequence[DiskNeed], speeds: dict[str, DiskSpeed] | None = None, longest: float = _PROBE_SECONDS
) -> list[Check]:
    """Check every file system to be written; `speeds` receives its speed, measured in `longest` seconds each way."""
    # Places that cannot even be looked at have no mount to speak of: their one check says so.
    hidden = [need for need in needs if not os.access(nearest_existing(need.path), os.F_OK)]
    checks = [writability(need.path) for need in hidden]
    for mount, wanted in by_mount(need for need in needs if need not in hidden):
        writable = [writability(path) for path in dict.fromkeys(nearest_existing(need.path) for need in wanted)]
        checks += [*writable, space(mount, wanted), inodes(mount, wanted), storage(mount, wanted)]
        checks += [locking(need.path, mount) for need in wanted if need.database]
        # What cannot be written cannot be timed, and memory need not be.
        if all(check.status == "ok" for check in writable) and kind_of(mount) != "memory":
            checks.append(throughput(wanted[0].path, mount, speeds=speeds, longest=longest))
    return checks


def space(mount: Mount, needs: Sequence[DiskNeed]) -> Check:
    """Compare a file system's free bytes with planned writes and a margin."""
    stats = os.statvfs(nearest_existing(needs[0].path))
    free = stats.f_bavail * stats.f_frsize
    wanted = sum(need.bytes for need in needs)
    total = wanted + round(wanted * MARGIN_SHARE) + MARGIN_BYTES
    parts = ", ".join(f"{need.what} {size(need.bytes)}" for need in needs)
    enough = free >= total
    return Check(
        name="disk.space",
        status="ok" if enough else "fail",
        measured=f"{size(free)} free on {_named(mount)}",
        needed=f"{size(total)}: {parts}, margin {size(total - wanted)}",
        remedy="" if enough else f"use a disk with {size(total - free)} more, or free that much",
    )


def inodes(mount: Mount, needs: Sequence[DiskNeed]) -> Check:
    """Compare a file system's free inodes, if it has any, with the planned files."""
    stats = os.statvfs(nearest_existing(needs[0].path))
    wanted = sum(need.files for need in needs) + MARGIN_FILES
    # File systems without a fixed table of inodes (btrfs, many network ones) say 0 of 0.
    enough = stats.f_files == 0 or stats.f_favail >= wanted
    free = f"{stats.f_favail} inodes free" if stats.f_files else "unlimited inodes"
    return Check(
        name="disk.inodes",
        status="ok" if enough else "fail",
        measured=f"{free} on {_named(mount)}",
        needed=f"{wanted} inodes",
        remedy="" if enough else "remove small files (caches, old checkouts) there, or use another disk",
    )


def storage(mount: Mount, needs: Sequence[DiskNeed]) -> Check:
    """Judge a file system's kind for its contents."""
    kind = kind_of(mount)
    kept = [need.what for need in needs if need.keep]
    warning = ""
    if kind == "memory":
        warning = "use a disk: this is RAM, which is lost at every stop and counts against the memory limit"
    elif kind == "overlay" and kept:
        warning = (
            f"mount a volume or give --checkpoint: {', '.join(kept)} would be lost with the container, "
            "whose own disk this is"
        )
    elif kind == "object-store":
        warning = (
            "use a disk and --upload: this is an object store mounted as a folder, without random writes and locks"
        )
    return Check(
        name="disk.storage",
        status="warn" if warning else "ok",
        measured=f"{kind} storage: {_named(mount)}",
        needed="a disk that outlives the container" if kept else "a disk",
        remedy=warning,
    )


def locking(path: Path, mount: Mount) -> Check:
    """Take and release the locks of SQLite and the job, at the database's place."""
    kind = kind_of(mount)
    fault, by_file = _lock_fault(path)
    if fault or kind == "object-store":
        status, remedy = "fail", "put the workspace on a local disk; give --checkpoint for what must survive"
    elif by_file:
        status, remedy = "warn", "start only one run of this job at a time, or put the workspace on a local disk"
    elif kind == "network":
        status, remedy = "warn", "run only one job there: locks work, but SQLite is not made for network disks"
    else:
        status, remedy = "ok", ""
    return Check(
        name="disk.locks",
        status=status,
        measured=fault or (f"{_named(mount)} {_BY_FILE}" if by_file else f"file locks work on {_named(mount)}"),
        needed="file locks for study.db and the job",
        remedy=remedy,
    )


def _lock_fault(path: Path) -> tuple[str | None, bool]:
    """Return why locks fail beside a path, and whether a file must replace the job's lock."""
    folder = nearest_existing(path)
    by_file = False
    try:
        with tempfile.TemporaryFile(dir=folder if folder.is_dir() else folder.parent) as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno not in MISSING:
                    raise
                by_file = True
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return f"no file locks in {folder}: {error.strerror or error}", by_file
    return None, by_file


def writability(path: Path) -> Check:
    """Create, fill, rename and delete a file, leaving nothing behind."""
    folder = nearest_existing(path)
    try:
        _probe_file(folder)
    except OSError as error:
        return Check(
            name="disk.writable",
            status="fail",
            measured=f"cannot write in {folder}: {error.strerror or error}",
            needed="a writable folder",
            remedy="free space, correct its permissions or choose another folder",
        )
    return Check(name="disk.writable", status="ok", measured=f"{folder} is writable", needed="a writable folder")


def _probe_file(folder: Path) -> None:
    descriptor, name = tempfile.mkstemp(prefix=".preflight-", dir=folder)
    probe, renamed = Path(name), Path(name + ".renamed")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(b"\0" * 4096)
            file.flush()
            os.fsync(file.fileno())
        probe.rename(renamed)
    finally:
        probe.unlink(missing_ok=True)
        renamed.unlink(missing_ok=True)


def measure_speed(folder: Path, most: int = _PROBE_BYTES, seconds: float = _PROBE_SECONDS) -> DiskSpeed:
    """Write and read back up to `most` bytes in an unnamed file, so that no kill leaves it. Raises OSError."""
    # Random, so that a compressing file system does not flatter itself.
    block = os.urandom(min(_BLOCK, most))
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        started, written = time.perf_counter(), 0
        while written < most and (written == 0 or time.perf_counter() - started < seconds):
            written += file.write(block)
            # After each block: one at the end could take minutes on a slow disk.
            os.fdatasync(file.fileno())
        write = written / max(time.perf_counter() - started, 1e-9)
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        os.lseek(file.fileno(), 0, os.SEEK_SET)
        started, read = time.perf_counter(), 0
        while read < written and (read == 0 or time.perf_counter() - started < seconds):
            read += len(file.read(_BLOCK))
        return DiskSpeed(write=write, read=read / max(time.perf_counter() - started, 1e-9))


def throughput(
    path: Path,
    mount: Mount,
    floor: DiskSpeed | None = None,
    *,
    speeds: dict[str, DiskSpeed] | None = None,
    longest: float = _PROBE_SECONDS,
) -> Check:
    """Measure a file system's speed, and record it in `speeds`."""
    floor = floor or DiskSpeed(write=SLOWEST_WRITE, read=SLOWEST_READ)
    needed = f"{speed(floor.write)} written, {speed(floor.read)} read"
    try:
        found = measure_speed(nearest_existing(path), seconds=min(_PROBE_SECONDS, longest))
    except OSError as error:
        return Check(
            name="disk.speed",
            status="fail",
            measured=f"cannot write to {_named(mount)}: {error.strerror or error}",
            needed=needed,
            remedy="free space or choose another folder",
        )
    if speeds is not None:
        speeds[mount.point] = found
    slow = found.write < floor.write or (found.read) < (floor.read)
    return Check(
        name="disk.speed",
        status="warn" if slow else "ok",
        measured=f"{speed(found.write)} written, {speed(found.read)} read on {_named(mount)}",
        needed=needed,
        remedy="choose a machine with a faster disk: loading and export will take long" if slow else "",
    )


def _named(mount: Mount) -> str:
    return f"{mount.point} ({mount.kind})"
