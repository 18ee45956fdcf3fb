"""Checks of this process's limits, as read by `job.preflight.limits`."""

from __future__ import annotations

from collections.abc import Mapping

from job.preflight.checks import GIB, MIB, Check, size
from job.preflight.limits import (
    OTHER_THREADS,
    POOLS,
    Cpus,
    Limits,
    Memory,
    effective_cpus,
    recommended_threads,
)

FEWEST_FILES = 256
ENOUGH_FILES = 1024
# What a container runtime grants unless told otherwise (64 MiB) is enough for one process.
SHARED_BYTES = 60 * MIB
# A CUDA context reserves addresses for all memory of the machine and its GPUs.
CUDA_ADDRESSES = 512 * GIB
_THREAD_VARIABLE = "OMP_NUM_THREADS"


def ram(memory: Memory, needed: int) -> Check:
    """Compare available memory with the need, in bytes; swap only slows down."""
    fits, swaps = memory.available >= needed, memory.available + memory.swap_free >= needed
    limit = f", limited to {size(memory.limit)} by the container" if memory.limit is not None else ""
    remedy = f"choose a machine with {size(needed - memory.available)} more RAM, or end other processes"
    if swaps and not fits:
        remedy = f"{remedy}: it would swap, which is very slow"
    return Check(
        name="memory.ram",
        status="ok" if fits else "warn" if swaps else "fail",
        measured=f"{size(memory.available)} of {size(memory.total)} available{limit}, {size(memory.swap_free)} swap",
        needed=size(needed),
        remedy="" if fits else remedy,
    )


def shared_memory(memory: Memory, needed: int = SHARED_BYTES) -> Check:
    """Compare /dev/shm with the libraries' need for several processes or GPUs, in bytes."""
    enough = (memory.shared or 0) >= needed
    return Check(
        name="memory.shm",
        status="ok" if enough else "warn",
        measured="no /dev/shm" if memory.shared is None else f"/dev/shm has {size(memory.shared)}",
        needed=size(needed),
        remedy="" if enough else "start the container with --shm-size=1g or --ipc=host",
    )


def threads(cpus: Cpus, environment: Mapping[str, str]) -> Check:
    """Compare the libraries' threads, capped by OMP_NUM_THREADS, with the limit."""
    pool = _capped(cpus, environment)
    wanted = POOLS * pool + OTHER_THREADS
    left = cpus.threads_left
    status, remedy = "ok", ""
    if left is not None and left < wanted:
        # With one thread in each pool it still would not do.
        hopeless = left < POOLS + OTHER_THREADS
        status = "fail" if hopeless else "warn"
        remedy = (
            "start the container with a higher --pids-limit, or choose another machine"
            if hopeless
            else f"set {_pool_settings(cpus)}"
        )
    return Check(
        name="limits.threads",
        status=status,
        measured=f"{'no limit on' if left is None else left} more threads, {cpus.visible} CPUs visible",
        needed=f"{wanted}: {POOLS} pools of {pool}, {OTHER_THREADS} others",
        remedy=remedy,
    )


def cpu_quota(cpus: Cpus, environment: Mapping[str, str]) -> Check:
    """Compare a pool's threads with the CPU quota: far more threads than CPUs only wait."""
    pool, effective = _capped(cpus, environment), effective_cpus(cpus)
    crowded = pool > 2 * effective
    quota = "no quota" if cpus.quota is None else f"time for {cpus.quota:.1f}"
    return Check(
        name="limits.cpus",
        status="warn" if crowded else "ok",
        measured=f"{cpus.visible} CPUs visible, {quota}",
        needed=f"at most {2 * effective} threads in a pool; {pool} would be started",
        remedy=f"set {_pool_settings(cpus)}" if crowded else "",
    )


def _capped(cpus: Cpus, environment: Mapping[str, str]) -> int:
    # OpenMP allows one number for each level of nesting.
    text = environment.get(_THREAD_VARIABLE, "").split(",")[0].strip()
    return int(text) if text.isdigit() and int(text) > 0 else cpus.visible


def _pool_settings(cpus: Cpus) -> str:
    count = recommended_threads(cpus)
    return " ".join(f"{name}={count}" for name in (_THREAD_VARIABLE, "RAYON_NUM_THREADS", "OPENBLAS_NUM_THREADS"))


def open_files(limits: Limits) -> Check:
    """Compare the limit of open files with the need of shards, sockets and libraries."""
    most = limits.open_files
    status = "ok" if most is None or most >= ENOUGH_FILES else "warn" if most >= FEWEST_FILES else "fail"
    return Check(
        name="limits.open-files",
        status=status,
        measured="unlimited" if most is None else f"{most} open files",
        needed=f"{ENOUGH_FILES} open files",
        remedy="" if status == "ok" else f"raise it: ulimit -n {ENOUGH_FILES}, or --ulimit nofile={ENOUGH_FILES}",
    )


def file_size(limits: Limits, largest: int) -> Check:
    """Compare the limit of file size with the largest file, in bytes."""
    fits = limits.file_size is None or limits.file_size >= largest
    return Check(
        name="limits.file-size",
        status="ok" if fits else "fail",
        measured="unlimited" if limits.file_size is None else f"files up to {size(limits.file_size)}",
        needed=f"files of {size(largest)}",
        remedy="" if fits else "lift it: ulimit -f unlimited",
    )


def address_space(limits: Limits, needed: int, *, cuda: bool) -> Check:
    """Compare the address space with mapped bytes: `needed` for files and RAM, and much more with CUDA."""
    total = needed + (CUDA_ADDRESSES if cuda else 0)
    fits = limits.address_space is None or limits.address_space >= total
    return Check(
        name="limits.address-space",
        status="ok" if fits else "fail",
        measured="unlimited" if limits.address_space is None else size(limits.address_space),
        needed=size(total),
        remedy="" if fits else "lift it: ulimit -v unlimited",
    )
