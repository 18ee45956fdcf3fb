"""Device faults during computation: out of memory, accelerator errors, hanging forwards."""

from __future__ import annotations

import faulthandler
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from job.errors import AcceleratorFaultError, MachineError, Stopped, first_line
from job.model.memory import release_memory
from job.system.failpoints import planted
from job.system.lifeline import tell
from job.system.periodic import every

T = TypeVar("T")
_CPU_OUT_OF_MEMORY = "can't allocate memory"


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error means that memory of a device or the machine ran out."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and _CPU_OUT_OF_MEMORY in str(error)


def halving(rows: int, compute: Callable[[int], T], report: Callable[[str], None]) -> tuple[T, int]:
    """Return compute(rows) and the rows, halved when memory runs out. Raises MachineError at one row."""
    while True:
        try:
            return compute(rows), rows
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if rows <= 1:
                raise out_of_memory(error) from error
        rows //= 2
        release_memory()
        report(f"warning: out of memory: trying again with {rows} rows a forward")


def out_of_memory(error: BaseException) -> MachineError:
    """Return the error for a machine whose memory does not suffice even for the least."""
    return MachineError(
        f"out of memory: {first_line(error)}",
        remedy="free the device of others, choose a larger one, or spread the model (loading.device_map)",
    )


class Watchdog:
    """Watches a model's forwards; one that takes too long is a hang, which only a restart ends."""

    def __init__(self, seconds: float, file: Path, leave: Callable[[int], Any] = os._exit) -> None:
        """Set the seconds per forward (0: no limit), and the file for all threads' stacks."""
        self._seconds = seconds
        self._file = file
        self._leave = leave
        self._since: float | None = None

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Watch the model's forwards within the block."""
        handles = [
            model.register_forward_pre_hook(self._begin),
            model.register_forward_hook(self._end, always_call=True),
        ]
        watched = every(min(self._seconds / 4, 10.0), self._look, "watchdog") if self._seconds else nullcontext()
        try:
            with watched:
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _begin(self, *_: Any) -> None:
        self._since = time.monotonic()
        _fail_as_told()

    def _end(self, *_: Any) -> None:
        self._since = None

    def _look(self) -> None:
        since = self._since
        if since is not None and time.monotonic() - since > self._seconds:
            with self._file.open("a") as file:
                faulthandler.dump_traceback(file)
            print(f"a forward has hung for {self._seconds:g} s; stacks are in {self._file}", file=sys.stderr)
            tell(hung=True)
            self._leave(Stopped.exit_code)


@contextmanager
def clear_faults() -> Iterator[None]:
    """Raise AcceleratorFaultError for accelerator errors, after which this process cannot continue."""
    try:
        yield
    except torch.AcceleratorError as error:
        raise AcceleratorFaultError(
            f"the device failed: {first_line(error)}",
            remedy="choose another machine if it goes on failing",
        ) from error


def _fail_as_told() -> None:
    """Raise the fault planted by a test."""
    if planted("accelerator"):
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
    if planted("memory"):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    if planted("hang"):
        time.sleep(3600)
