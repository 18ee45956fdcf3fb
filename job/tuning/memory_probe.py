"""Measure the peak memory of a computation against the available memory."""

from __future__ import annotations

import resource
from collections.abc import Sequence
from pathlib import Path

import torch

from job.model.memory import release_memory
from job.preflight.device_map import RAM_SHARE
from job.preflight.gradient_memory import GPU_SHARE
from job.preflight.limits import read_memory

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Gauge:
    """Measures the peak memory of a computation on each device of a model."""

    def __init__(self, model: torch.nn.Module, processes: int) -> None:
        """Read the available memory; `processes` share the RAM."""
        # Memory cached by the allocator would not be seen when reused.
        release_memory()
        places = {parameter.device for parameter in model.parameters()}
        self._gpus = sorted(place.index or 0 for place in places if place.type == "cuda")
        self._counts_ram = any(place.type != "cuda" for place in places)
        self.room = [int(GPU_SHARE * torch.cuda.mem_get_info(index)[0]) for index in self._gpus]
        if self._counts_ram:
            self.room.append(int(RAM_SHARE * read_memory().available / processes))

    def begin(self) -> None:
        """Start measuring."""
        release_memory()
        for index in self._gpus:
            torch.cuda.reset_peak_memory_stats(index)
        if self._counts_ram:
            _forget_peak()
        self._before = self._now()

    def growth(self) -> tuple[int, ...]:
        """Return the peak growth since then, bytes per device."""
        peaks = [torch.cuda.max_memory_allocated(index) for index in self._gpus]
        if self._counts_ram:
            peaks.append(_resident("VmHWM"))
        return tuple(max(peak - before, 0) for peak, before in zip(peaks, self._before, strict=True))

    def _now(self) -> list[int]:
        used = [torch.cuda.memory_allocated(index) for index in self._gpus]
        return [*used, _resident("VmRSS")] if self._counts_ram else used

    def fits(self, growth: Sequence[float]) -> bool:
        """Return whether such growth fits."""
        return all(taken <= room for taken, room in zip(growth, self.room, strict=True))


def _forget_peak() -> None:
    """Reset the kernel's peak of this process; if that is forbidden, the peak is only overestimated."""
    try:
        _CLEAR.write_text("5")
    except OSError:
        return


def _resident(name: str) -> int:
    for line in _STATUS.read_text().splitlines() if _STATUS.exists() else ():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
