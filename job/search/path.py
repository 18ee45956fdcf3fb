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
# Range of a component's scale: weaker than the path is the aim, slightly stronger is allowed.
_SCALES = (0.4, 1.2)


@dataclass(frozen=True)
class PathSpace:
    """Edits on a path of at least one stage, with a strength scale per component."""

    path: EditPath

    def distributions(self) -> dict[str, BaseDistribution]:
        """Return the range of every parameter."""
        last = float(len(self.path.stages) - 1)
        scales = {f"{component}.scale": FloatDistribution(*_SCALES) for component in COMPONENTS}
        return {POSITION: FloatDistribution(0.0, last), **scales}

    def known_points(self) -> list[dict[str, Any]]:
        """Return the stages' ends as parameters, the last and weakest first."""
        scales = {f"{component}.scale": 1.0 for component in COMPONENTS}
        return [{POSITION: float(stage), **scales} for stage in reversed(range(len(self.path.stages)))]

    def edit(self, params: Mapping[str, Any]) -> EditParameters:
        """Return a trial's edit; θ and directions are interpolated linearly."""
        stages, position = self.path.stages, params[POSITION]
        lower = min(int(position), len(stages) - 1)
        lower_stage, upper_stage = stages[lower], stages[min(lower + 1, len(stages) - 1)]
        share, largest = position - lower, self.path.largest

        def strengths(component: Component) -> LayerStrengths:
            scale = largest * params[f"{component}.scale"]
            return tuple(
                tuple(scale * _sigmoid((1 - share) * a + share * b) for a, b in zip(below, above, strict=True))
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
