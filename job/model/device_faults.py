"""Device faults during computation: out of memory, accelerator errors, hanging forwards."""

from __future__ import annotations

import errno
import faulthandler
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from job.errors import AcceleratorFaultError, MemoryShortageError, Stopped, first_line
from job.model.memory import release_memory
from job.system.failpoints import planted
from job.system.lifeline import tell
from job.system.periodic import every

T = TypeVar("T")
# What torch raises as RuntimeError or AcceleratorError: its allocators, the runtimes and drivers of CUDA and HIP,
# and libraries that allocate for themselves (cuBLAS, cuSOLVER, cuSPARSE, cuFFT, cuDNN, hipBLAS, rocBLAS, MIOpen).
_OUT_OF_MEMORY = re.compile(
    r"out of memory|can't allocate memory|cannot allocate memory|not enough memory|failed to allocate|"
    r"ALLOC(ATION)?_FAILED|StatusAllocFailed|rocblas_status_memory_error|hipErrorOutOfMemory|cudaErrorMemoryAllocation",
    re.IGNORECASE,
)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error means that memory of a device or the machine ran out."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and _OUT_OF_MEMORY.search(str(error)) is not None


def is_of_device(error: BaseException) -> bool:
    """Return whether memory or the device failed, not the code that raised the error."""
    return isinstance(error, torch.AcceleratorError) or is_out_of_memory(error)


@dataclass(frozen=True)
class Shortage:
    """A computation for which memory did not suffice; `reason` is the first line of its error."""

    reason: str

    def error(self) -> MemoryShortageError:
        """Return the error for a machine whose memory does not suffice even for the least."""
        return MemoryShortageError(
            f"out of memory: {self.reason or 'none is left'}",
            remedy="free the device of others, choose a larger one, or spread the model (loading.device_map)",
        )


def within_memory(compute: Callable[[], T]) -> T | Shortage:
    """Return compute(), or a Shortage once all that it held has been released."""
    try:
        return compute()
    except (RuntimeError, MemoryError, OSError) as error:
        if not is_out_of_memory(error):
            raise
        shortage = Shortage(next(iter(str(error).strip().splitlines()), ""))
    # Not before: an exception that is being handled keeps the frames that raised it, and their tensors.
    release_memory()
    return shortage


def halving(rows: int, compute: Callable[[int], T], report: Callable[[str], None]) -> tuple[T, int]:
    """Return compute(rows) and the rows, halved when memory runs out. Raises MachineError at one row."""
    while True:
        found = within_memory(partial(compute, rows))
        if not isinstance(found, Shortage):
            return found, rows
        if rows <= 1:
            raise found.error()
        rows //= 2
        report(f"warning: out of memory: trying again with {rows} rows a forward")


def on_device_or_cpu(
    compute: Callable[[Mapping[str, Tensor]], T], tensors: Mapping[str, Tensor], report: Callable[[str], None]
) -> T:
    """Return compute(tensors), on the CPU where their device's memory does not suffice or they are on several."""
    if len({tensor.device for tensor in tensors.values()}) == 1:
        found = within_memory(partial(compute, tensors))
        if not isinstance(found, Shortage):
            return found
    report("warning: out of memory: directions are computed on the CPU")
    return compute({name: tensor.cpu() for name, tensor in tensors.items()})


class Watchdog:
    """Watches a model's forwards; one that takes too long is a hang, which only a restart ends."""

    def __init__(self, seconds: float, file: Path, leave: Callable[[int], Any] = os._exit) -> None:
        """Set the seconds per forward (0: no limit), and the file for all threads' stacks."""
        self._seconds = seconds
        self._file = file
        self._exit = leave
        self._since: float | None = None

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Watch the model's forwards within the block."""
        handles = [
            model.register_forward_pre_hook(self._begin),
            model.register_forward_hook(self._end, always_call=True),
        ]
        watched = (
            every(min(self._seconds / 4, 10.0), self._exit_if_stuck, "watchdog") if self._seconds else nullcontext()
        )
        try:
            with watched:
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _begin(self, *_: Any) -> None:
        self._since = time.monotonic()
        _raise_planted_fault()

    def _end(self, *_: Any) -> None:
        self._since = None

    def _exit_if_stuck(self) -> None:
        since = self._since
        if since is not None and time.monotonic() - since > self._seconds:
            with self._file.open("a") as file:
                faulthandler.dump_traceback(file)
            print(f"a forward has hung for {self._seconds:g} s; stacks are in {self._file}", file=sys.stderr)
            tell(hung=True)
            self._exit(Stopped.exit_code)


@contextmanager
def clear_faults() -> Iterator[None]:
    """Raise AcceleratorFaultError for accelerator errors, after which this process cannot continue.

    Raises MachineError where memory has run out and nothing within the block could do with less.
    """
    try:
        yield
    except (RuntimeError, MemoryError, OSError) as error:
        if is_out_of_memory(error):
            raise Shortage(first_line(error)).error() from error
        if not isinstance(error, torch.AcceleratorError):
            raise
        raise AcceleratorFaultError(
            f"the device failed: {first_line(error)}",
            remedy="choose another machine if it goes on failing",
        ) from error


def _raise_planted_fault() -> None:
    """Raise the fault planted by a test."""
    if planted("accelerator"):
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
    if planted("memory"):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    if planted("hang"):
        time.sleep(3600)
