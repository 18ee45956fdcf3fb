"""Losses, variables and optimiser of edits found by gradient.

The model is frozen and an edit acts on its outputs, so a loss over logits is differentiable in the edit's strengths and
directions. Strengths are λ_max σ(θ), hence between 0 and λ_max; directions keep unit length.

Legend of shapes: K edits, C components, L layers, k directions per layer, d the residual width, n rows of a forward, t
positions of a row.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor
from torch.nn.functional import softplus

from job.numerics.ablation import RowNormalization, WeightProjections, WriterEdit, ablate, weight_products
from job.numerics.basis import REPETITION

_DECAYS, _LEAST = (0.9, 0.999), 1e-8


@dataclass(frozen=True)
class EditVariables:
    """Variables of the descent.

    Attributes:
        logits: θ of every strength, [K, C, L, k].
        directions: Directions of every layer, [K, L, k, d], of any norm; zero rows pad layers with fewer.
    """

    logits: Tensor
    directions: Tensor

    def strengths(self, largest: float) -> Tensor:
        """Return strengths λ = `largest` · sigmoid(θ), [K, C, L, k]."""
        return largest * self.logits.sigmoid()

    def orthonormal(self) -> Tensor:
        """Return the directions orthonormalised in order, [K, L, k, d]."""
        return orthonormal_rows(self.directions)

    def with_gradients(self) -> Self:
        """Return leaf copies that require gradients."""
        return type(self)(*(value.detach().clone().requires_grad_() for value in (self.logits, self.directions)))

    def gradients(self) -> Self:
        """Return the accumulated gradients; zeros where there are none."""
        values = (self.logits, self.directions)
        return type(self)(*(torch.zeros_like(value) if value.grad is None else value.grad for value in values))


def orthonormal_rows(vectors: Tensor, metric: Tensor | None = None) -> Tensor:
    """Orthonormalise vectors in order, [..., k, d], differentiably; repetitions become zero.

    `metric` [d] weights the entries of inner products.
    """
    weights = vectors.new_ones(()) if metric is None else metric

    def unit(row: Tensor, least: float) -> Tensor:
        square = (row.square() * weights).sum(-1, keepdim=True)
        empty = square <= least**2
        return torch.where(empty, 0.0, row * torch.where(empty, 1.0, square).rsqrt())

    rows: list[Tensor] = []
    for given in vectors.unbind(-2):
        row = unit(given, 0.0)
        for _ in range(2 if rows else 0):
            for previous in rows:
                row = row - (row * previous * weights).sum(-1, keepdim=True) * previous
        rows.append(unit(row, REPETITION))
    return torch.stack(rows, -2)


def writer_edit(
    weight: Tensor | None,
    directions: Tensor,
    strengths: Tensor,
    mode: RowNormalization,
    metric: Tensor | None = None,
) -> WriterEdit:
    """Return a writer's ablation, differentiable in directions [K, k, d] and λ [K, k], both float64.

    Directions are orthonormal in `metric` (`job.numerics.ablation.write_metric`). `weight` [d, i] may be None in the
    mode "none".
    """
    if weight is None:
        weight = directions.new_empty(0)
    products = weight_products(weight, directions.flatten(0, 1), mode, metric)

    def by_edit(table: Tensor | None) -> Tensor | None:
        return None if table is None else table.reshape(*directions.shape[:2], -1)

    tables = (products.row_products, products.column_products, products.column_writes)
    return ablate(products, WeightProjections(directions, *map(by_edit, tables)), strengths)


def refusal_term(log_probability: Tensor, margin: float) -> Tensor:
    """Return softplus(log p + margin), [n]; log p is the joint log-probability of a refusal's first tokens, [n]."""
    return softplus(log_probability + margin)


def sequence_log_probabilities(logits: Tensor, tokens: Tensor, real: Tensor) -> Tensor:
    """Return the joint log-probability [n] of `tokens` [n, t] under logits [n, t, vocabulary], where `real`."""
    chosen = logits.gather(-1, tokens[..., None])[..., 0] - logits.logsumexp(-1)
    return torch.where(real, chosen, 0.0).sum(-1)


def answer_divergence(base: Tensor, edited: Tensor, real: Tensor) -> Tensor:
    """Return KL(base ‖ edited) per row: the mean of the first token's and the average token's, [n], nats.

    The first token weighs most: edits are compared by it, and differ most from the base model there. `base` and
    `edited` are logits [n, t, vocabulary]; `real` [n, t] is False for padding, never at the first position.
    """
    log_base = base.log_softmax(-1)
    by_position = torch.where(real, (log_base.exp() * (log_base - edited.log_softmax(-1))).sum(-1), 0.0)
    return (by_position[:, 0] + by_position.sum(-1) / real.sum(-1)) / 2


@dataclass(frozen=True)
class AdamState:
    """Adam's moving averages of gradients and of squared gradients, after `steps` steps."""

    first: EditVariables
    second: EditVariables
    steps: int

    @classmethod
    def zero(cls, variables: EditVariables) -> AdamState:
        """Return the state before the first step."""
        zeros = EditVariables(torch.zeros_like(variables.logits), torch.zeros_like(variables.directions))
        return cls(zeros, zeros, 0)


def adam_step(
    variables: EditVariables, gradients: EditVariables, state: AdamState, rate: float, turn: float
) -> tuple[EditVariables, AdamState]:
    """Take a step of Adam (Kingma and Ba 2015) at θ's learning rate, then orthonormalise the directions.

    `turn` is the approximate largest angle of a step, radians. Adam moves each of a unit vector's d coordinates by its
    rate, so the vector by √d times that.
    """
    steps = state.steps + 1
    width = variables.directions.shape[-1]
    moved, means, squares = [], [], []
    for name, pace in (("logits", rate), ("directions", turn / width**0.5)):
        gradient = getattr(gradients, name)
        mean = torch.lerp(gradient, getattr(state.first, name), _DECAYS[0])
        square = torch.lerp(gradient.square(), getattr(state.second, name), _DECAYS[1])
        unbiased, scale = mean / (1 - _DECAYS[0] ** steps), (square / (1 - _DECAYS[1] ** steps)).sqrt()
        moved.append(getattr(variables, name) - pace * unbiased / (scale + _LEAST))
        means.append(mean)
        squares.append(square)
    logits, directions = moved
    # A layer without a direction keeps none: its zero row must stay zero.
    directions = torch.where(variables.directions == 0, 0.0, directions) if turn else variables.directions
    updated = EditVariables(logits, orthonormal_rows(directions) if turn else directions)
    return updated, AdamState(EditVariables(*means), EditVariables(*squares), steps)


def minibatch(seed: int, step: int, name: str, count: int, size: int) -> list[int]:
    """Return the indices of the prompts in a step's minibatch; depends only on the arguments."""
    digest = hashlib.sha256(f"{seed}:{step}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    chosen: list[int] = torch.randperm(count, generator=generator)[:size].tolist()
    return chosen
