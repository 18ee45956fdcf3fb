"""Shared by benchmarks: clocks, memory, the machine's description and the JSON of figures."""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from job.model.devices import hardware
from job.model.memory import release_memory

LIBRARIES = ("torch", "transformers", "optuna")
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Clock:
    """Times work on a device: on a GPU by wall clock, synchronized; on a CPU by process time.

    A CPU is shared with other processes, whose time must not count. There it is this process' CPU time divided by its
    threads, so serial parts count less than they take. Wall-clock time is reported beside it.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def now(self) -> Times:
        """Return the time after all work queued on the device is done."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            return Times(time.perf_counter(), time.perf_counter())
        return Times(time.process_time() / torch.get_num_threads(), time.perf_counter())

    def since(self, begin: Times) -> Times:
        """Return the time elapsed since `begin`."""
        now = self.now()
        return Times(now.seconds - begin.seconds, now.wall - begin.wall)

    def times(self, work: Callable[[], object]) -> Times:
        """Return the duration of `work`."""
        begin = self.now()
        work()
        return self.since(begin)


class Times(NamedTuple):
    """Seconds of the clock, and of wall time."""

    seconds: float
    wall: float


class Memory:
    """Memory of a device beyond what was in use at creation, bytes.

    On a GPU it is what torch allocated. On a CPU it is the resident memory reported by Linux, without freed memory that
    the allocator keeps: that would hide later allocations.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._before = 0
        self._before = self.held()

    def held(self) -> int:
        """Return the memory in use now."""
        if self._device.type == "cuda":
            return torch.cuda.memory_allocated(self._device) - self._before
        release_memory()
        return _status("VmRSS") - self._before

    def forget(self) -> None:
        """Reset the peak; where Linux does not allow it, the previous one stays."""
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            return
        release_memory()
        try:
            _CLEAR.write_text("5")
        except OSError as error:
            print(f"peaks are those of the whole process so far: {error}", file=sys.stderr)

    def peak(self) -> int:
        """Return the peak."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device) - self._before
        return _status("VmHWM") - self._before


def _status(name: str) -> int:
    (line,) = [line for line in _STATUS.read_text().splitlines() if line.startswith(f"{name}:")]
    return int(line.split()[1]) * 1024


def machine(device: torch.device) -> dict[str, Any]:
    """Describe the machine."""
    return {
        "hardware": hardware(device),
        "cores": os.cpu_count(),
        "load": os.getloadavg(),
        "versions": {name: importlib.metadata.version(name) for name in LIBRARIES},
    }


def write_figures(file: Path, figures: dict[str, Any]) -> None:
    """Write a benchmark's figures as JSON and print the path."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(figures, indent=1) + "\n")
    print(f"figures: {file}")
