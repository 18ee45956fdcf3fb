"""A model on its device, whose phases are measured one after the other: time against the roofline, and memory."""

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
    """A model on its device, and what has been measured of it."""

    shape: Shape
    loaded: LoadedModel
    ceilings: Ceilings
    clock: Clock
    memory: Memory
    phases: list[dict[str, Any]] = field(default_factory=list)

    def phase(self, name: str, work: Callable[[], Any], *, extra: Work | None = None, share: int = 1) -> Any:
        """Do a piece of work, note what it took beside what it takes at least, and return what it returns.

        Args:
            name: What is done.
            work: Does it.
            extra: What it costs at least beside forwards.
            share: What comes out is divided by this: trials of a batch.
        """
        self.memory.forget()
        results: list[Any] = []
        with recorded(self.loaded.model) as forwards:
            took = self.clock.times(lambda: results.append(work()))
        costs = works(forwards, self.shape.facts, self.shape.dtype.itemsize) + ([extra] if extra else [])
        least = roofline(costs, self.ceilings)
        # In this order: what is held a moment later may be a page more.
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
    """Print the line of a phase."""
    print(
        f"{phase['phase']:>28} {phase['seconds']:9.3f} {phase['wall_s']:9.3f} {phase['flops'] / 1e12:9.3f} "
        f"{phase['bytes'] / 1e9:9.2f} {phase['roofline_s']:9.3f} {phase['share']:6.1%} "
        f"{phase['peak_bytes'] / GIB:8.2f} {phase['peak_of_model']:8.1%}",
        flush=True,
    )
