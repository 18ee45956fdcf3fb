"""Measure the phases of a model on its device: time against the roofline, and memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from benchmarks.measuring import Clock, Memory
from benchmarks.random_models import Shape
from benchmarks.roofline import Ceilings, recorded, roofline, works
from job.model.loading import LoadedModel
from job.preflight.estimate import Work

GIB = 2**30
HEAD = (
    f"{'phase':>28} {'s':>9} {'wall s':>9} {'TFLOP':>9} {'GB':>9} {'roofline':>9} {'share':>6} {'peak GiB':>8} "
    f"{'of model':>8}"
)


@dataclass
class Bench:
    """A model on its device and its measurements."""

    shape: Shape
    loaded: LoadedModel
    ceilings: Ceilings
    clock: Clock
    memory: Memory
    phases: list[dict[str, Any]] = field(default_factory=list)

    def phase(self, name: str, work: Callable[[], Any], *, extra: Work | None = None, share: int = 1) -> Any:
        """Run `work`, record its cost beside the lower bound, and return its result.

        Args:
            name: Name of the phase.
            work: The work.
            extra: Its lower bound beyond forwards.
            share: Divisor of the results: trials per batch.
        """
        self.memory.forget()
        results: list[Any] = []
        with recorded(self.loaded.model) as forwards:
            took = self.clock.times(lambda: results.append(work()))
        costs = works(forwards, self.shape.facts, self.shape.dtype.itemsize) + ([extra] if extra else [])
        least = roofline(costs, self.ceilings)
        # In this order: reading the memory a moment later may count another page.
        held, peak = self.memory.held(), self.memory.peak()
        found = {
            **{"phase": name, "seconds": took.seconds / share, "wall_s": took.wall / share},
            **{"flops": least.flops / share, "bytes": least.bytes / share},
            **{"arithmetic_s": least.arithmetic_s / share, "memory_s": least.memory_s / share},
            **{"roofline_s": least.seconds / share, "share": least.seconds / took.seconds},
            **{"peak_bytes": peak, "peak_of_model": peak / self.shape.weights_bytes, "held_bytes": held},
            "forwards": [asdict(one) for one in forwards],
        }
        self.phases.append(found)
        show(found)
        return results[0]


def show(phase: dict[str, Any]) -> None:
    """Print the row of a phase."""
    print(
        f"{phase['phase']:>28} {phase['seconds']:9.3f} {phase['wall_s']:9.3f} {phase['flops'] / 1e12:9.3f} "
        f"{phase['bytes'] / 1e9:9.2f} {phase['roofline_s']:9.3f} {phase['share']:6.1%} "
        f"{phase['peak_bytes'] / GIB:8.2f} {phase['peak_of_model']:8.1%}",
        flush=True,
    )
