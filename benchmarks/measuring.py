"""What benchmarks share: how memory is watched, what a machine is called, where figures go."""

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

from job.model.loading import hardware
from job.model.memory import release_memory

LIBRARIES = ("torch", "transformers", "optuna")
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Clock:
    """Times work on a device: on a GPU by the wall, until it is done and not only handed over.

    A CPU is shared with other processes, whose time is not to count: there it is this process' own, divided by its
    threads, so that what is not spread over them counts less than it takes. The wall's is told beside it.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def now(self) -> Times:
        """Return the time once the device has done all that it was given."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            return Times(time.perf_counter(), time.perf_counter())
        return Times(time.process_time() / torch.get_num_threads(), time.perf_counter())

    def since(self, begin: Times) -> Times:
        """Return how long it is since then."""
        now = self.now()
        return Times(now.seconds - begin.seconds, now.wall - begin.wall)

    def times(self, work: Callable[[], object]) -> Times:
        """Return how long a piece of work takes."""
        begin = self.now()
        work()
        return self.since(begin)


class Times(NamedTuple):
    """Seconds as a clock counts them, and by the wall."""

    seconds: float
    wall: float


class Memory:
    """What a device holds beyond what it held when this was made, bytes.

    Of a GPU it is what torch has allocated, of a CPU the process' resident memory as Linux counts it, without what the
    allocator keeps of what was freed: that would hide what is taken next.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._before = 0
        self._before = self.held()

    def held(self) -> int:
        """Return what is held now."""
        if self._device.type == "cuda":
            return torch.cuda.memory_allocated(self._device) - self._before
        release_memory()
        return _status("VmRSS") - self._before

    def forget(self) -> None:
        """Let the peak begin again from what is held now; where Linux does not allow it, the former one stands."""
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            return
        release_memory()
        try:
            _CLEAR.write_text("5")
        except OSError as error:
            print(f"peaks are those of the whole process so far: {error}", file=sys.stderr)

    def peak(self) -> int:
        """Return the most that has been held."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device) - self._before
        return _status("VmHWM") - self._before


def _status(name: str) -> int:
    (line,) = [line for line in _STATUS.read_text().splitlines() if line.startswith(f"{name}:")]
    return int(line.split()[1]) * 1024


def machine(device: torch.device) -> dict[str, Any]:
    """Return in words what figures were measured on."""
    return {
        "hardware": hardware(device),
        "cores": os.cpu_count(),
        "load": os.getloadavg(),
        "versions": {name: importlib.metadata.version(name) for name in LIBRARIES},
    }


def write_figures(file: Path, figures: dict[str, Any]) -> None:
    """Write a benchmark's figures as JSON and say where."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(figures, indent=1) + "\n")
    print(f"figures: {file}")
