"""This process's limits on memory, CPUs, threads and files, by kernel and cgroups.

`read_memory`, `read_cpus` and `read_limits` read this machine, or a recorded copy of its /proc and /sys;
`job.preflight.limit_checks` judges the results.
"""

from __future__ import annotations

import math
import os
import resource
from pathlib import Path
from typing import Literal

import psutil

from job.preflight.mounts import Mount, parse_mountinfo
from job.records import Record

# cgroup v1 says "no limit" with the largest multiple of a page.
_NO_LIMIT = 1 << 60
# Threads that belong to no pool: main, signal, CUDA driver, heartbeat, downloads, uploads.
OTHER_THREADS = 64
# Pools that by default get a thread for each CPU they see: OpenMP, torch's inter-op pool, BLAS, tokenizers.
POOLS = 4
# More threads than this gain nothing for the little that this job computes on the CPU.
MOST_THREADS = 32


class Memory(Record):
    """Memory in bytes.

    Attributes:
        total: The machine's memory, or a smaller cgroup limit.
        limit: Tightest cgroup limit, or None.
        shared: Size of /dev/shm, or None.
    """

    total: int
    available: int
    limit: int | None = None
    swap_free: int = 0
    shared: int | None = None


class Cpus(Record):
    """CPUs and threads.

    Attributes:
        visible: Allowed CPUs; thread pools start one thread each.
        quota: CPUs' worth of time granted by cgroups, or None.
    """

    visible: int
    quota: float | None = None
    threads_left: int | None = None


class Limits(Record):
    """Soft resource limits of this process; None means unlimited."""

    open_files: int | None
    file_size: int | None
    address_space: int | None


def read_memory(root: Path = Path("/")) -> Memory:
    """Return total and available memory."""
    info = {}
    for line in (root / "proc/meminfo").read_text().splitlines():
        name, _, value = line.partition(":")
        info[name] = int(value.split()[0]) * 1024
    limits = [found for folder in cgroup_folders("memory", root) if (found := _memory_limit(folder))]
    tightest = min((limit for limit, _ in limits), default=None)
    return Memory(
        total=min([info["MemTotal"], *(limit for limit, _ in limits)]),
        available=max(min([info["MemAvailable"], *(limit - used for limit, used in limits)]), 0),
        limit=tightest if tightest is not None and tightest < info["MemTotal"] else None,
        swap_free=info.get("SwapFree", 0),
        shared=_shared_memory(root),
    )


def _memory_limit(folder: Path) -> tuple[int, int] | None:
    """Return a cgroup's limit and usage without droppable page cache."""
    # memory.high does not kill, but what lies above it is throttled to a standstill.
    names = ("memory.max", "memory.high", "memory.limit_in_bytes")
    limits = [number for name in names if (number := _number(folder / name)) is not None]
    if not limits:
        return None
    used = _number(folder / "memory.current") or _number(folder / "memory.usage_in_bytes") or 0
    stats = {}
    try:
        for line in (folder / "memory.stat").read_text().splitlines():
            name, _, value = line.partition(" ")
            stats[name] = int(value)
    except OSError:
        # Without statistics all use counts.
        stats = {}
    prefix = "total_" if "total_inactive_file" in stats else ""
    cache = stats.get(f"{prefix}inactive_file", 0) + stats.get(f"{prefix}active_file", 0)
    return min(limits), max(used - cache, 0)


def _shared_memory(root: Path) -> int | None:
    try:
        stats = os.statvfs(root / "dev/shm")
    except OSError:
        return None
    return stats.f_blocks * stats.f_frsize


def read_cpus(root: Path = Path("/")) -> Cpus:
    """Return available CPUs and threads."""
    quotas = [quota for folder in cgroup_folders("cpu", root) if (quota := _cpu_quota(folder)) is not None]
    rooms = []
    for folder in cgroup_folders("pids", root):
        most, current = _number(folder / "pids.max"), _number(folder / "pids.current")
        if most is not None:
            rooms.append(max(most - (current or 0), 0))
    # The kernel lets root exceed the number of processes of a user.
    most_processes = resource.getrlimit(resource.RLIMIT_NPROC)[0]
    if root == Path("/") and most_processes != resource.RLIM_INFINITY and os.geteuid() != 0:
        rooms.append(max(most_processes - _threads_of_this_user(), 0))
    return Cpus(visible=_visible_cpus(), quota=min(quotas, default=None), threads_left=min(rooms, default=None))


def _visible_cpus() -> int:
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:
        return os.cpu_count() or 1


def _threads_of_this_user() -> int:
    user = os.getuid()
    count = 0
    for process in psutil.process_iter(["uids", "num_threads"]):
        uids = process.info["uids"]
        if uids is not None and uids.real == user:
            count += process.info["num_threads"] or 1
    return count


def _cpu_quota(folder: Path) -> float | None:
    try:
        quota, period = (folder / "cpu.max").read_text().split()
    except (OSError, ValueError):
        old = _number(folder / "cpu.cfs_quota_us"), _number(folder / "cpu.cfs_period_us")
        return old[0] / old[1] if old[0] and old[1] and old[0] > 0 else None
    return None if quota == "max" else int(quota) / int(period)


def _number(path: Path) -> int | None:
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return None if text == "max" or int(text) >= _NO_LIMIT else int(text)


def cgroup_folders(controller: str, root: Path = Path("/")) -> list[Path]:
    """Return this process's cgroup folders for a controller, v1 or v2, innermost first."""
    try:
        mounts = parse_mountinfo((root / "proc/self/mountinfo").read_text(errors="surrogateescape"))
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    folders: list[Path] = []
    for line in lines:
        identifier, names, path = line.split(":", 2)
        version: Literal[1, 2] = 2 if identifier == "0" and not names else 1
        if version == 1 and controller not in names.split(","):
            continue
        for mount in mounts:
            if _serves(mount, controller, version):
                folders += _cgroup_ancestors(mount, path, root)
                break
    return folders


def _serves(mount: Mount, controller: str, version: Literal[1, 2]) -> bool:
    if version == 2:
        return mount.kind == "cgroup2"
    return mount.kind == "cgroup" and controller in mount.options


def _cgroup_ancestors(mount: Mount, path: str, root: Path) -> list[Path]:
    """Return a cgroup's folder and its ancestors, up to the mount."""
    top = root / mount.point.lstrip("/")
    # In a container the mount may show only the part of the tree that its own cgroup is.
    below = os.path.relpath(path, mount.root)
    folder = top if below.startswith("..") else top / below
    if not folder.is_dir():
        folder = top
    folders = [folder]
    while folders[-1] != top:
        folders.append(folders[-1].parent)
    return folders


def read_limits() -> Limits:
    """Return this process's resource limits."""

    def soft(kind: int) -> int | None:
        limit = resource.getrlimit(kind)[0]
        return None if limit == resource.RLIM_INFINITY else limit

    return Limits(
        open_files=soft(resource.RLIMIT_NOFILE),
        file_size=soft(resource.RLIMIT_FSIZE),
        address_space=soft(resource.RLIMIT_AS),
    )


def effective_cpus(cpus: Cpus) -> int:
    """Return how many threads can run at once: visible CPUs, or fewer by quota."""
    return cpus.visible if cpus.quota is None else max(min(cpus.visible, math.ceil(cpus.quota)), 1)


def recommended_threads(cpus: Cpus) -> int:
    """Return a size for every thread pool that keeps all together within the limits."""
    threads = min(effective_cpus(cpus), MOST_THREADS)
    if cpus.threads_left is not None:
        threads = min(threads, (cpus.threads_left - OTHER_THREADS) // POOLS)
    return max(threads, 1)
