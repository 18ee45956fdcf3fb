"""The CUDA driver's library through ctypes: its version, and this process's devices.

Independent of torch and of tools' text output. Source: CUDA Driver API reference.
"""

from __future__ import annotations

import ctypes
from ctypes import byref, c_char, c_int, c_size_t, c_void_p

from job.records import Record

LIBRARY = "libcuda.so.1"
_NO_DEVICE = 100
_MAJOR, _MINOR = 75, 76


class CudaDevice(Record):
    """A device as listed by the driver, after CUDA_VISIBLE_DEVICES."""

    uuid: str
    name: str
    total_bytes: int
    compute_capability: tuple[int, int]


class CudaReading(Record):
    """State of the driver's library.

    Attributes:
        version: Supported CUDA version, 1000 × major + 10 × minor; None without the library.
        error: Why the installed library does not work.
    """

    version: int | None = None
    error: str | None = None
    devices: tuple[CudaDevice, ...] = ()


def read_cuda(library: str = LIBRARY) -> CudaReading:
    """Return the driver's version and devices, empty without a driver.

    It initialises the driver without a context: later changes of CUDA_VISIBLE_DEVICES have no effect.
    """
    try:
        cuda = ctypes.CDLL(library)
    except OSError:
        return CudaReading()
    try:
        version = c_int()
        known = version.value if cuda.cuDriverGetVersion(byref(version)) == 0 else None
        status = cuda.cuInit(0)
        # A driver without devices is nothing to complain about: it is a CPU machine.
        if status not in (0, _NO_DEVICE):
            return CudaReading(version=known, error=f"cuInit: {_error(cuda, status)}")
        count = c_int()
        if status == _NO_DEVICE or cuda.cuDeviceGetCount(byref(count)) != 0:
            return CudaReading(version=known)
        return CudaReading(version=known, devices=tuple(_device(cuda, index) for index in range(count.value)))
    except (AttributeError, OSError) as error:
        # A library of that name which lacks these functions is no driver that we know.
        return CudaReading(error=str(error))


def _error(cuda: ctypes.CDLL, status: int) -> str:
    text = ctypes.c_char_p()
    if cuda.cuGetErrorString(status, byref(text)) == 0 and text.value:
        return f"{text.value.decode(errors='replace')} ({status})"
    return f"error {status}"


def _device(cuda: ctypes.CDLL, index: int) -> CudaDevice:
    handle = c_int()
    _check(cuda, cuda.cuDeviceGet(byref(handle), index))
    name = (c_char * 256)()
    _check(cuda, cuda.cuDeviceGetName(name, 256, handle))
    total = c_size_t()
    _check(cuda, cuda.cuDeviceTotalMem_v2(byref(total), handle))
    numbers = []
    for attribute in (_MAJOR, _MINOR):
        value = c_int()
        _check(cuda, cuda.cuDeviceGetAttribute(byref(value), attribute, handle))
        numbers.append(value.value)
    return CudaDevice(
        uuid=_uuid(cuda, handle),
        name=name.value.decode(errors="replace"),
        total_bytes=total.value,
        compute_capability=(numbers[0], numbers[1]),
    )


def _uuid(cuda: ctypes.CDLL, handle: c_int) -> str:
    """Return a device's or MIG slice's UUID in hexadecimal, "" if the driver is too old."""
    raw = (ctypes.c_ubyte * 16)()
    # The second version tells the slice's own id where the device is one; older drivers lack it.
    ask = getattr(cuda, "cuDeviceGetUuid_v2", None) or cuda.cuDeviceGetUuid
    if ask(byref(raw), handle) != 0:
        return ""
    text = bytes(raw).hex()
    return "-".join((text[:8], text[8:12], text[12:16], text[16:20], text[20:]))


def free_bytes(index: int, library: str = LIBRARY) -> int | None:
    """Return a device's free memory by cuMemGetInfo, or None.

    It needs a context, which temporarily takes some hundred MiB; for machines without NVML.
    """
    try:
        cuda = ctypes.CDLL(library)
        handle, context = c_int(), c_void_p()
        _check(cuda, cuda.cuInit(0))
        _check(cuda, cuda.cuDeviceGet(byref(handle), index))
        _check(cuda, cuda.cuDevicePrimaryCtxRetain(byref(context), handle))
        try:
            free, total = c_size_t(), c_size_t()
            _check(cuda, cuda.cuCtxPushCurrent_v2(context))
            status = cuda.cuMemGetInfo_v2(byref(free), byref(total))
            cuda.cuCtxPopCurrent_v2(byref(c_void_p()))
            _check(cuda, status)
            return free.value
        finally:
            cuda.cuDevicePrimaryCtxRelease_v2(handle)
    except (AttributeError, OSError):
        # The caller distinguishes unknown free memory from none.
        return None


def _check(cuda: ctypes.CDLL, status: int) -> None:
    if status != 0:
        raise OSError(f"CUDA driver: {_error(cuda, status)}")
