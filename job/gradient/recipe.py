"""The numbers of the descent. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Recipe:
    """Numbers of the descent; how they were found is in docs/lab-notes/gradient.md.

    Attributes:
        batch: Prompts of each kind that a step reads.
        refusal_tokens: First tokens of the base model's refusals that are to become unlikely, together.
        margin: Nats by which they are to be unlikely.
        kl_tokens: First tokens of the base model's responses to good prompts that are to stay.
        largest: λ_max, no unit.
        start: θ at the beginning: hardly any edit.
        rate: Step of θ in the first stage.
        turn: Angle by which a step turns directions there, radians.
        decay: Factor of both from one β to the next.
        sparsity: Weight of the mean strength while refusals remain.
        sparsity_after: Its weight once they are gone.
        first_beta: Weight of the KL divergence in the first stage.
        factor: From one β to the next.
        first_stages: Stages at least before β grows.
        steps: Steps of a stage.
        stages: Stages at most.
        target_weight: Weight of the targets' term once there are targets; 0: none are made.
        refusal_weight: Weight of the refusal term beside it.
    """

    batch: int = 24
    refusal_tokens: int = 4
    margin: float = 3.0
    kl_tokens: int = 8
    largest: float = 1.5
    start: float = -3.0
    rate: float = 0.4
    turn: float = 0.1
    decay: float = 0.6
    sparsity: float = 0.02
    sparsity_after: float = 1.0
    first_beta: float = 10.0
    factor: float = 3.0
    first_stages: int = 2
    steps: int = 12
    stages: int = 6
    target_weight: float = 0.5
    refusal_weight: float = 0.5
