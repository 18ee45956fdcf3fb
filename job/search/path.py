"""The search space around the gradient path of edits. Needs no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from optuna.distributions import BaseDistribution, FloatDistribution

from job.records import COMPONENTS, Component, EditParameters, LearnedDirections
from job.records.edit_path import EditPath
from job.records.edits import LayerStrengths

POSITION = "path.position"
# Range of a component's scale. Weaker edits are gentler; up to twice as strong ones remove what the path's leave.
SCALES = (0.4, 2.0)
_FORMER_SCALES = (0.4, 1.2)
_NAMES = tuple(f"{component}.scale" for component in COMPONENTS)


@dataclass(frozen=True)
class PathSpace:
    """Edits on a path of at least one stage, with a strength scale per component."""

    path: EditPath

    def distributions(self) -> dict[str, BaseDistribution]:
        """Return the range of every parameter."""
        last = float(len(self.path.stages) - 1)
        scales = {name: FloatDistribution(*(self.path.scales or _FORMER_SCALES)) for name in _NAMES}
        return {POSITION: FloatDistribution(0.0, last), **scales}

    def known_points(self) -> list[dict[str, Any]]:
        """Return the stages' ends as parameters, the last and weakest first, and the last one at its strongest."""
        last = len(self.path.stages) - 1
        places = [(stage, 1.0) for stage in range(last, -1, -1)]
        if self.path.scales is not None:
            places.append((last, self.path.scales[1]))
        return [{POSITION: float(stage), **dict.fromkeys(_NAMES, scale)} for stage, scale in places]

    def edit(self, params: Mapping[str, Any]) -> EditParameters:
        """Return a trial's edit; θ and directions are interpolated linearly, and λ is at most λ_max."""
        stages, position = self.path.stages, params[POSITION]
        lower = min(int(position), len(stages) - 1)
        lower_stage, upper_stage = stages[lower], stages[min(lower + 1, len(stages) - 1)]
        share, largest = position - lower, self.path.largest
        most = math.inf if self.path.scales is None else largest

        def strengths(component: Component) -> LayerStrengths:
            scale = largest * float(params[f"{component}.scale"])

            def strength(a: float, b: float) -> float:
                return min(scale * _sigmoid((1 - share) * a + share * b), most)

            return tuple(
                tuple(strength(a, b) for a, b in zip(below, above, strict=True))
                for below, above in zip(lower_stage.logits[component], upper_stage.logits[component], strict=True)
            )

        learned = None
        if self.path.directions is not None:
            learned = LearnedDirections(sha256=self.path.directions, position=position)
        return EditParameters(
            direction_index=None,
            kernels={},
            layer_strengths={component: strengths(component) for component in COMPONENTS},
            directions=learned,
        )


def _sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value)) if value > 0 else math.exp(value) / (1 + math.exp(value))
