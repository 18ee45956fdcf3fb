"""Losses, variables and the optimiser of an edit that is found by gradient.

The model is frozen and an edit acts on its outputs, so a loss over logits is a differentiable function of the edit's
strengths and directions. Strengths are λ_max σ(θ), so that they stay between 0 and λ_max; directions keep unit length.

Legend of shapes: K edits side by side, C components, L layers, k directions a layer, d the residual width, n rows of a
forward, t positions of a row.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor
from torch.nn.functional import softplus

from job.numerics.ablation import RowNormalization, WeightProjections, WriterEdit, ablate, weight_products

_DECAYS, _LEAST = (0.9, 0.999), 1e-8


@dataclass(frozen=True)
class EditVariables:
    """What the descent moves.

    Attributes:
        logits: θ of every strength, [K, C, L, k].
        directions: Directions of every layer, [K, L, k, d]; of any length, rows of zeros where a layer has fewer.
    """

    logits: Tensor
    directions: Tensor

    def strengths(self, largest: float) -> Tensor:
        """Return λ, [K, C, L, k]."""
        return largest * self.logits.sigmoid()

    def orthonormal(self) -> Tensor:
        """Return directions made orthonormal in their order, [K, L, k, d]."""
        return orthonormal_rows(self.directions)

    def with_gradients(self) -> Self:
        """Return copies that collect gradients."""
        return type(self)(*(value.detach().clone().requires_grad_() for value in (self.logits, self.directions)))

    def gradients(self) -> Self:
        """Return the gradients collected; zeros where there are none."""
        values = (self.logits, self.directions)
        return type(self)(*(torch.zeros_like(one) if one.grad is None else one.grad for one in values))


def orthonormal_rows(vectors: Tensor) -> Tensor:
    """Return vectors made orthonormal in their order, [..., k, d], differentiably; zeros stay zeros."""
    rows: list[Tensor] = []
    for row in vectors.unbind(-2):
        for _ in range(2 if rows else 0):
            for other in rows:
                row = row - (row * other).sum(-1, keepdim=True) * other
        square = row.square().sum(-1, keepdim=True)
        empty = square == 0
        rows.append(torch.where(empty, 0.0, row * torch.where(empty, 1.0, square).rsqrt()))
    return torch.stack(rows, -2)


def writer_edit(weight: Tensor | None, directions: Tensor, strengths: Tensor, mode: RowNormalization) -> WriterEdit:
    """Return the ablation of a writer as a differentiable function of directions and strengths.

    Args:
        weight: The weight, [d, i]; None if the mode is "none".
        directions: Orthonormal directions, [K, k, d], float64.
        strengths: λ, [K, k], float64.
        mode: The norm-preserving mode.
    """
    if weight is None:
        weight = directions.new_empty(0)
    products = weight_products(weight, directions.flatten(0, 1), mode)

    def by_edit(table: Tensor | None) -> Tensor | None:
        return None if table is None else table.reshape(*directions.shape[:2], -1)

    projections = WeightProjections(directions, by_edit(products.row_products), by_edit(products.column_products))
    return ablate(products, projections, strengths)


def refusal_term(log_probability: Tensor, margin: float) -> Tensor:
    """Return softplus(log p(r) + m) of every row, [n]: how far a refusal is from being m nats unlikely.

    Args:
        log_probability: log p of a refusal's first tokens together, [n].
        margin: m, nats.
    """
    return softplus(log_probability + margin)


def sequence_log_probabilities(logits: Tensor, tokens: Tensor, real: Tensor) -> Tensor:
    """Return the log-probability of every row's tokens together, [n].

    Args:
        logits: Logits that lead to the tokens, [n, t, vocabulary].
        tokens: The tokens, [n, t].
        real: Which of them are no padding, [n, t].
    """
    chosen = logits.gather(-1, tokens[..., None])[..., 0] - logits.logsumexp(-1)
    return torch.where(real, chosen, 0.0).sum(-1)


def answer_divergence(base: Tensor, edited: Tensor, real: Tensor) -> Tensor:
    """Return KL(base ‖ edited) of every row, half that of the first token and half the mean of all, [n], nats.

    The first token weighs most: it is what edits are compared by, and where they differ most from the base model.

    Args:
        base: Logits of the base model, [n, t, vocabulary].
        edited: Logits of the edited one.
        real: Which positions are no padding, [n, t]; the first always is.
    """
    log_base = base.log_softmax(-1)
    by_position = torch.where(real, (log_base.exp() * (log_base - edited.log_softmax(-1))).sum(-1), 0.0)
    return (by_position[:, 0] + by_position.sum(-1) / real.sum(-1)) / 2


@dataclass(frozen=True)
class AdamState:
    """Moving averages of gradients.

    Attributes:
        first: Of gradients.
        second: Of their squares.
        steps: Steps taken.
    """

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
    """Take a step of Adam (Kingma and Ba 2015); directions are made orthonormal after it.

    Args:
        variables: Where the step begins.
        gradients: Of the loss there.
        state: The averages so far.
        rate: Step of θ.
        turn: Angle by which a step turns a direction at most, about, in radians. Adam moves every coordinate by as
            much as its rate, so that a unit vector of d of them is moved by √d times that.
    """
    steps = state.steps + 1
    width = variables.directions.shape[-1]
    moved, first, second = [], [], []
    for name, pace in (("logits", rate), ("directions", turn / width**0.5)):
        gradient = getattr(gradients, name)
        mean = torch.lerp(gradient, getattr(state.first, name), _DECAYS[0])
        square = torch.lerp(gradient.square(), getattr(state.second, name), _DECAYS[1])
        unbiased, scale = mean / (1 - _DECAYS[0] ** steps), (square / (1 - _DECAYS[1] ** steps)).sqrt()
        moved.append(getattr(variables, name) - pace * unbiased / (scale + _LEAST))
        first.append(mean)
        second.append(square)
    logits, directions = moved
    # A layer without a direction keeps none: its row of zeros must not be moved off zero.
    directions = torch.where(variables.directions == 0, 0.0, directions) if turn else variables.directions
    found = EditVariables(logits, orthonormal_rows(directions) if turn else directions)
    return found, AdamState(EditVariables(*first), EditVariables(*second), steps)


def minibatch(seed: int, step: int, name: str, count: int, size: int) -> list[int]:
    """Return which of `count` prompts a step takes, from nothing but the arguments."""
    digest = hashlib.sha256(f"{seed}:{step}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    chosen: list[int] = torch.randperm(count, generator=generator)[:size].tolist()
    return chosen
