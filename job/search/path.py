"""The gradient path of edits, and the search space around it. Needs no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from optuna.distributions import BaseDistribution, FloatDistribution
from pydantic import Field

from job.records import COMPONENTS, Component, EditParameters, LearnedDirections, Record
from job.records.edits import LayerStrengths

POSITION = "path.position"
# Range of a component's scale: weaker than the path is the aim, slightly stronger is allowed.
_SCALES = (0.4, 1.2)


class PathStage(Record):
    """The end of one stage of the gradient descent.

    Attributes:
        steps: Steps so far, earlier stages included.
        logits: θ of each component, layer and direction; strengths are λ_max σ(θ).
        kl: KL divergence over the first positions of held-out responses, nats.
    """

    beta: float
    steps: int
    logits: dict[Component, LayerStrengths]
    refusals: int
    broken: int = 0
    kl: float


class EditPath(Record):
    """directions/path.json: the kept stages of the gradient descent, in order.

    Attributes:
        largest: λ_max.
        directions: SHA-256 of the learned directions, one set per stage; None if layers keep the basis.
        failed: Why there is no path and the search uses TPE; None if there is one.
    """

    version: Literal[1] = 1
    key: str
    largest: float = Field(gt=0)
    prompts: int
    stages: tuple[PathStage, ...]
    directions: str | None = Field(None, pattern=r"^[0-9a-f]{64}$")
    failed: str | None = None


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
