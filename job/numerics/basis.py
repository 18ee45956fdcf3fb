"""Orthonormal direction bases of all layers, with a weight per direction.

Legend of shapes: layers, k directions per layer, d the residual width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Weighting = Literal["eigenvalue", "equal"]

# A unit direction is a repetition if less than this remains of it outside the span of those before it.
REPETITION = 1e-3


@dataclass(frozen=True)
class Basis:
    """An orthonormal basis per layer.

    Attributes:
        directions: Orthonormal rows, the most important first, [layers, k, d]; zero rows pad layers with fewer.
        weights: Ablation strength of each direction relative to the edit's, [layers, k].
    """

    directions: Tensor
    weights: Tensor

    @classmethod
    def single(cls, directions: Tensor) -> Basis:
        """Return bases of one unit direction per layer, [layers, d]."""
        return cls(directions[:, None], directions.new_ones(len(directions), 1))

    def cpu(self) -> Basis:
        """Return a copy on the CPU, to send to other processes."""
        return Basis(self.directions.cpu(), self.weights.cpu())

    @property
    def layers(self) -> int:
        """Number of layers."""
        return len(self.directions)

    @property
    def size(self) -> int:
        """Directions per layer, k."""
        return self.directions.shape[1]

    @property
    def candidates(self) -> Tensor:
        """All directions as the rows that `select` combines, [layers · k, d]."""
        return self.directions.flatten(0, 1)

    def candidates_of(self, _layer: int) -> Tensor:
        """Return the rows that edits of a layer combine, [layers · k, d]: all layers' directions."""
        return self.candidates

    def select(self, index: float | None, layer: int) -> tuple[Tensor, Tensor]:
        """Return the orthonormal directions to ablate in a layer, and their weights [k].

        They are combinations of the candidates, [k, layers · k], with zero rows where a layer has fewer; float64, on
        the CPU. `index` is the layer whose directions are ablated in every layer, interpolated linearly if fractional;
        None uses each layer's own. Raises ValueError outside 0 … layers - 1.
        """
        last = self.layers - 1
        if index is not None and not 0 <= index <= last:
            raise ValueError(f"direction index {index} is outside 0 … {last}")
        position = float(layer) if index is None else index
        lower = min(int(position), last)
        upper = min(lower + 1, last)
        share = position - lower
        involved = self.directions[lower : upper + 1].to("cpu", torch.float64).flatten(0, 1)
        interpolation = torch.zeros(self.size, len(involved), dtype=torch.float64)
        for row in range(self.size):
            interpolation[row, row] += 1 - share
            interpolation[row, row - self.size] += share  # the upper layer's rows are the last ones
        coefficients = torch.zeros(self.size, self.layers * self.size, dtype=torch.float64)
        coefficients[:, lower * self.size :][:, : len(involved)] = _orthonormal(interpolation, involved)
        weights = self.weights[lower : upper + 1].to("cpu", torch.float64)
        return coefficients, (1 - share) * weights[0] + share * weights[-1]


@dataclass(frozen=True)
class DirectionPath:
    """Stages of unit directions [stages, layers, k, d], interpolated linearly; zero rows pad layers with fewer."""

    directions: Tensor

    @property
    def layers(self) -> int:
        """Number of layers."""
        return self.directions.shape[1]

    @property
    def size(self) -> int:
        """Directions per layer, k."""
        return self.directions.shape[2]

    def candidates_of(self, layer: int) -> Tensor:
        """Return the rows that edits of a layer combine, [stages · k, d]: its directions at all stages."""
        return self.directions[:, layer].flatten(0, 1)

    def combine(self, position: float) -> Tensor:
        """Return a position's combinations of a layer's candidates, [k, stages · k], float64.

        They interpolate between the two adjacent stages, are the same for all layers and not yet orthonormal (see
        `orthonormal_in`). Raises ValueError.
        """
        stages, size = len(self.directions), self.size
        if not 0 <= position <= stages - 1:
            raise ValueError(f"position {position} is outside 0 … {stages - 1}")
        lower = min(int(position), stages - 1)
        upper = min(lower + 1, stages - 1)
        combinations = torch.zeros(size, stages, size, dtype=torch.float64)
        every = torch.arange(size)
        combinations[every, lower, every] += 1 - (position - lower)
        combinations[every, upper, every] += position - lower
        return combinations.flatten(1)


def _orthonormal(coefficients: Tensor, vectors: Tensor) -> Tensor:
    """Orthonormalise combinations [k, m] of vectors [m, d] in order; repetitions become zero."""
    rows: list[Tensor] = []
    for row in coefficients:
        for _ in range(2):  # one pass leaves a rounding error relative to the remaining norm
            for previous in rows:
                row = row - ((row @ vectors) @ (previous @ vectors)) * previous
        norm = (row @ vectors).norm()
        rows.append(row / norm if norm > REPETITION else torch.zeros_like(row))
    return torch.stack(rows)


def orthonormal_in(coefficients: Tensor, gram: Tensor) -> Tensor:
    """Orthonormalise combinations [..., k, m] of vectors in order, on the CPU; repetitions become zero.

    `gram` [..., m, m], float64, is the vectors' Gram matrix; leading dimensions broadcast.
    """
    used = coefficients.flatten(0, -2).any(0).nonzero().flatten()
    metric = gram[..., used[:, None], used]

    def inner(left: Tensor, right: Tensor) -> Tensor:
        return ((left[..., None, :] @ metric)[..., 0, :] * right).sum(-1, keepdim=True)

    rows: list[Tensor] = []
    for row in coefficients[..., used].unbind(-2):
        norm = inner(row, row).clamp_min(0).sqrt()
        row = torch.where(norm > 0, row / norm, row)
        for _ in range(2):
            for previous in rows:
                row = row - inner(row, previous) * previous
        norm = inner(row, row).clamp_min(0).sqrt()
        rows.append(torch.where(norm > REPETITION, row / norm, 0.0))
    orthonormal = torch.stack(rows, -2)
    result = orthonormal.new_zeros(*orthonormal.shape[:-1], coefficients.shape[-1])
    result[..., used] = orthonormal
    return result


def orthonormal_basis(directions: Tensor, weights: Tensor) -> Basis:
    """Return bases from unit directions [layers, k, d] in order of importance.

    Repetitions become zero rows with weight 0: ablating correlated directions would ablate their common part twice.
    """
    identity = torch.eye(directions.shape[1], dtype=torch.float64)
    bases = []
    for layer in directions:
        vectors = layer.to("cpu", torch.float64)
        bases.append(_orthonormal(identity, vectors) @ vectors)
    basis = torch.stack(bases)
    nonzero = basis.norm(dim=-1) > 0
    return Basis(basis.to(torch.float32), torch.where(nonzero, weights.to("cpu", torch.float32), 0.0))


def eigenvalue_weights(eigenvalues: Tensor, weighting: Weighting) -> Tensor:
    """Return weights [layers, k] in 0 … 1 for eigenvalues [layers, k]; 0 for eigenvalues of 0.

    The square root of λ / λ_max is the ratio of standard deviations along the directions. A softmax over the
    eigenvalues would be one-hot: they differ by hundreds.
    """
    positive = eigenvalues > 0
    if weighting == "equal":
        return positive.to(torch.float32)
    largest = eigenvalues.amax(-1, keepdim=True).clamp_min(torch.finfo(eigenvalues.dtype).tiny)
    return torch.where(positive, (eigenvalues.clamp_min(0) / largest).sqrt(), 0.0).to(torch.float32)


def orthogonalize(directions: Tensor, references: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """Project references [layers, r, d] out of unit directions [layers, k, d], layer by layer.

    Returns unit directions, and the layers left unchanged because a direction lies within the references' span.
    """
    result, unchanged = [], []
    identity = torch.eye(references.shape[1], dtype=torch.float64)
    for index, (layer, reference) in enumerate(zip(directions, references, strict=True)):
        vectors, span = layer.to("cpu", torch.float64), reference.to("cpu", torch.float64)
        span = _orthonormal(identity, span) @ span
        for _ in range(2):
            vectors = vectors - (vectors @ span.T) @ span
        norms = vectors.norm(dim=-1, keepdim=True)
        within_span = (norms <= REPETITION) & (layer.to(norms).norm(dim=-1, keepdim=True) > 0)
        if bool(within_span.any()):
            unchanged.append(index)
        unit = vectors / norms.clamp_min(torch.finfo(norms.dtype).tiny)
        result.append(torch.where(within_span, layer.to(unit), torch.where(norms > REPETITION, unit, 0.0)))
    return torch.stack(result).to(torch.float32), tuple(unchanged)
