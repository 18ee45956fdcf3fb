"""The gradient path of edits."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from job.records.base import Record
from job.records.edits import Component, LayerStrengths

Scale = Annotated[float, Field(gt=0, allow_inf_nan=False)]


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
        scales: Range of the scales of the components' strengths; None for the narrower one of former versions.
        directions: SHA-256 of the learned directions, one set per stage; None if layers keep the basis.
        failed: Why there is no path and the search uses TPE; None if there is one.
    """

    version: Literal[1] = 1
    key: str
    largest: float = Field(gt=0)
    scales: tuple[Scale, Scale] | None = None
    prompts: int
    stages: tuple[PathStage, ...]
    directions: str | None = Field(None, pattern=r"^[0-9a-f]{64}$")
    failed: str | None = None
