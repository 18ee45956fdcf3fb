"""NVIDIA's management library: free memory and its holders, ECC errors, MIG, driver version.

A query without an answer is None: there is no driver, it is too old, or the device does not support the query.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pynvml

from job.preflight.readings import Holder
from job.records import Record

# Inode of the machine's first process namespace (include/linux/proc_ns.h): only there are NVML's ids ours.
_FIRST_NAMESPACE = 0xEFFFFFFC


class NvmlDevice(Record):
    """NVML's data on a device.

    Attributes:
        total_bytes: Memory without the driver's reserve.
        ecc_uncorrected: Uncorrected memory errors since the driver was loaded.
        mig: MIG is on, or the device is a slice.
    """

    total_bytes: int | None = None
    free_bytes: int | None = None
    ecc_uncorrected: int | None = None
    mig: bool = False
    holders: tuple[Holder, ...] = ()


@contextmanager
def nvml_session() -> Iterator[None]:
    """Open NVML for the block; every query in it is None if NVML is unavailable."""
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        yield
        return
    try:
        yield
    finally:
        _ask(pynvml.nvmlShutdown)


def driver_version() -> str | None:
    """Return the driver's version, e.g. "570.124.06"."""
    version: str | None = _ask(pynvml.nvmlSystemGetDriverVersion)
    return version


def read_device(uuid: str) -> NvmlDevice:
    """Return a device's or MIG slice's data by UUID."""
    for prefix in ("GPU-", "MIG-"):
        handle = _ask(pynvml.nvmlDeviceGetHandleByUUID, f"{prefix}{uuid}")
        if handle is not None:
            total, free = _memory(handle)
            uncorrected = pynvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, pynvml.NVML_VOLATILE_ECC
            mode = _ask(pynvml.nvmlDeviceGetMigMode, handle)
            return NvmlDevice(
                total_bytes=total,
                free_bytes=free,
                ecc_uncorrected=_ask(pynvml.nvmlDeviceGetTotalEccErrors, handle, *uncorrected),
                mig=prefix == "MIG-" or (mode is not None and mode[0] == pynvml.NVML_DEVICE_MIG_ENABLE),
                holders=_holders(handle),
            )
    return NvmlDevice()


def _ask(query: Callable[..., Any], *arguments: object) -> Any:
    try:
        return query(*arguments)
    except pynvml.NVMLError:
        return None


def _memory(handle: Any) -> tuple[int | None, int | None]:
    # The first version counts the driver's reserve as used, the second separately.
    if new := _ask(pynvml.nvmlDeviceGetMemoryInfo, handle, pynvml.nvmlMemory_v2):
        return new.total - new.reserved, new.free
    old = _ask(pynvml.nvmlDeviceGetMemoryInfo, handle)
    return (old.total, old.free) if old else (None, None)


def _holders(handle: Any) -> tuple[Holder, ...]:
    queries = pynvml.nvmlDeviceGetComputeRunningProcesses_v3, pynvml.nvmlDeviceGetGraphicsRunningProcesses_v3
    # By process: one that computes and draws is in both lists.
    used = {process.pid: process.usedGpuMemory for query in queries for process in _ask(query, handle) or ()}
    return tuple(_holder(*one) for one in used.items())


def _holder(pid: int, used: int | None) -> Holder:
    name = None
    if _pids_are_ours():
        try:
            name = psutil.Process(pid).name()
        except psutil.Error:
            # It has ended meanwhile, or its name is hidden from us.
            name = None
    return Holder(pid=pid, name=name, used_bytes=used, ours=_pids_are_ours() and pid == os.getpid())


def _pids_are_ours() -> bool:
    """Return whether the driver's process ids are valid here: not in a container."""
    try:
        return Path("/proc/self/ns/pid").stat().st_ino == _FIRST_NAMESPACE
    except OSError:
        return False
