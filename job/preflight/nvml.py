"""NVIDIA's management library through ctypes: free memory and its holders, ECC errors, MIG, driver version.

Unanswered queries are None. Source: NVML API reference.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import Structure, byref, c_char, c_uint, c_ulonglong, c_void_p
from pathlib import Path

import psutil

from job.preflight.readings import Holder
from job.records import Record

LIBRARY = "libnvidia-ml.so.1"
_TOO_SMALL = 7
_UNKNOWN = (1 << 64) - 1
_UNCORRECTED, _SINCE_LOADED = 1, 0
# Inode of the machine's first process namespace (include/linux/proc_ns.h): only there are NVML's ids ours.
_FIRST_NAMESPACE = 0xEFFFFFFC


class _Memory(Structure):
    _fields_ = [("total", c_ulonglong), ("free", c_ulonglong), ("used", c_ulonglong)]


class _MemoryV2(Structure):
    _fields_ = [
        ("version", c_uint),
        ("total", c_ulonglong),
        ("reserved", c_ulonglong),
        ("free", c_ulonglong),
        ("used", c_ulonglong),
    ]


class _Process(Structure):
    _fields_ = [
        ("pid", c_uint),
        ("used", c_ulonglong),
        ("gpu_instance", c_uint),
        ("compute_instance", c_uint),
    ]


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


class Nvml:
    """An open session of `open_nvml`."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library

    def driver_version(self) -> str | None:
        """Return the driver's version, e.g. "570.124.06"."""
        text = (c_char * 96)()
        return text.value.decode() if self._ask("nvmlSystemGetDriverVersion", text, c_uint(96)) else None

    def device(self, uuid: str) -> NvmlDevice | None:
        """Return a device's or MIG slice's data by UUID, None if unknown."""
        handle = c_void_p()
        for prefix in ("GPU-", "MIG-"):
            if self._ask("nvmlDeviceGetHandleByUUID", f"{prefix}{uuid}".encode(), byref(handle)):
                total, free = self._memory(handle)
                return NvmlDevice(
                    total_bytes=total,
                    free_bytes=free,
                    ecc_uncorrected=self._ecc(handle),
                    mig=prefix == "MIG-" or self._mig(handle),
                    holders=self._holders(handle),
                )
        return None

    def _ask(self, name: str, *arguments: object) -> bool:
        """Return whether a function exists and succeeds."""
        function = getattr(self._library, name, None)
        return function is not None and function(*arguments) == 0

    def _memory(self, handle: c_void_p) -> tuple[int | None, int | None]:
        # The first version counts what the driver reserves as used, the second tells it apart.
        new = _MemoryV2(version=ctypes.sizeof(_MemoryV2) | 2 << 24)
        if self._ask("nvmlDeviceGetMemoryInfo_v2", handle, byref(new)):
            return int(new.total - new.reserved), int(new.free)
        old = _Memory()
        if self._ask("nvmlDeviceGetMemoryInfo", handle, byref(old)):
            return int(old.total), int(old.free)
        return None, None

    def _ecc(self, handle: c_void_p) -> int | None:
        count = c_ulonglong()
        kinds = c_uint(_UNCORRECTED), c_uint(_SINCE_LOADED)
        return int(count.value) if self._ask("nvmlDeviceGetTotalEccErrors", handle, *kinds, byref(count)) else None

    def _mig(self, handle: c_void_p) -> bool:
        current, pending = c_uint(), c_uint()
        return self._ask("nvmlDeviceGetMigMode", handle, byref(current), byref(pending)) and current.value == 1

    def _holders(self, handle: c_void_p) -> tuple[Holder, ...]:
        found: dict[int, Holder] = {}
        for name in ("nvmlDeviceGetComputeRunningProcesses_v3", "nvmlDeviceGetGraphicsRunningProcesses_v3"):
            for process in self._processes(name, handle):
                # One that computes and draws is in both lists.
                found[process.pid] = _holder(process.pid, process.used)
        return tuple(found.values())

    def _processes(self, name: str, handle: c_void_p) -> list[_Process]:
        function = getattr(self._library, name, None)
        if function is None:
            return []
        count = c_uint(64)
        buffer = (_Process * count.value)()
        status = function(handle, byref(count), buffer)
        if status == _TOO_SMALL:
            # Some may have come since it counted them.
            count = c_uint(count.value * 2)
            buffer = (_Process * count.value)()
            status = function(handle, byref(count), buffer)
        return list(buffer[: count.value]) if status == 0 else []


@contextmanager
def open_nvml(library: str = LIBRARY) -> Iterator[Nvml | None]:
    """Open NVML for the block; None if unavailable."""
    try:
        loaded = ctypes.CDLL(library)
        started = loaded.nvmlInit_v2() == 0
    except (OSError, AttributeError):
        # No driver, or a library of that name that is none.
        yield None
        return
    if not started:
        yield None
        return
    try:
        yield Nvml(loaded)
    finally:
        loaded.nvmlShutdown()


def _holder(pid: int, used: int) -> Holder:
    name = None
    if _pids_are_ours():
        try:
            name = psutil.Process(pid).name()
        except psutil.Error:
            # It has ended meanwhile, or its name is hidden from us.
            name = None
    return Holder(
        pid=pid,
        name=name,
        used_bytes=None if used == _UNKNOWN else used,
        ours=_pids_are_ours() and pid == os.getpid(),
    )


def _pids_are_ours() -> bool:
    """Return whether the driver's process ids are valid here: not in a container."""
    try:
        return Path("/proc/self/ns/pid").stat().st_ino == _FIRST_NAMESPACE
    except OSError:
        return False
