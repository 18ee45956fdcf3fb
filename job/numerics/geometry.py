"""Geometry of two classes of residuals in every layer.

Legend of shapes: n prompts, layers, d the residual width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Geometry:
    """Geometry per layer, each [layers], float64, on the CPU.

    Attributes:
        good_norm: Norm of the good mean.
        bad_norm: Norm of the bad mean.
        difference_norm: Norm of the difference of means.
        cosine_means: Cosine of the two means.
        cosine_good: Cosine of the direction and the good mean.
        cosine_bad: Cosine of the direction and the bad mean.
        cosine_previous: Cosine of the direction and the previous layer's; nan for the first.
        silhouette: Mean silhouette coefficient of the two classes (Rousseeuw 1987), -1 … 1.
        variance_share: Share of the residuals' variance along the direction.
    """

    good_norm: Tensor
    bad_norm: Tensor
    difference_norm: Tensor
    cosine_means: Tensor
    cosine_good: Tensor
    cosine_bad: Tensor
    cosine_previous: Tensor
    silhouette: Tensor
    variance_share: Tensor


def geometry(good: Tensor, bad: Tensor, directions: Tensor) -> Geometry:
    """Return the geometry of residuals [n, layers, d] and unit directions [layers, d]."""
    columns: list[Tensor] = []
    previous = None
    for layer in range(good.shape[1]):
        g, b = good[:, layer].to(torch.float64), bad[:, layer].to(torch.float64)
        direction = directions[layer].to(g)
        means = g.mean(0), b.mean(0)
        residuals = torch.cat([g, b])
        spread = residuals - residuals.mean(0)
        figures = (
            means[0].norm(),
            means[1].norm(),
            (means[1] - means[0]).norm(),
            _cosine(*means),
            _cosine(direction, means[0]),
            _cosine(direction, means[1]),
            g.new_tensor(torch.nan) if previous is None else _cosine(direction, previous),
            _silhouette(residuals, len(g)),
            (spread @ direction).square().sum() / spread.square().sum().clamp_min(torch.finfo(g.dtype).tiny),
        )
        columns.append(torch.stack(figures).cpu())
        previous = direction
    return Geometry(*torch.stack(columns, dim=1))


def projections(good: Tensor, bad: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
    """Project one layer's residuals [n, d] onto a plane, [n_good, 2] and [n_bad, 2], float64.

    The first axis is the unit direction [d], the second the first principal component of the remainder.
    """
    residuals = torch.cat([good, bad]).to(torch.float64)
    direction = direction.to(residuals)
    residuals = residuals - residuals.mean(0)
    along = residuals @ direction
    remainder = residuals - along[:, None] * direction
    # In sample space: the component's scores are an eigenvector of the Gram matrix times the root of its eigenvalue.
    values, vectors = torch.linalg.eigh(remainder @ remainder.T)
    across = vectors[:, -1] * values[-1].clamp_min(0).sqrt()
    across = across * (1 if across[across.abs().argmax()] >= 0 else -1)
    plane = torch.stack([along, across], dim=1)
    return plane[: len(good)], plane[len(good) :]


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    return torch.nn.functional.cosine_similarity(a, b, dim=0)


def _silhouette(points: Tensor, n_first: int) -> Tensor:
    """Return the mean silhouette of points [n, d]; the first n_first are one class, the rest the other."""
    sizes = (n_first, len(points) - n_first)
    if min(sizes) < 2:
        return points.new_tensor(torch.nan)
    distances = torch.cdist(points, points)
    sums = torch.stack([distances[:, :n_first].sum(1), distances[:, n_first:].sum(1)])
    own = (torch.arange(len(points), device=points.device) >= n_first).long()
    counts = torch.tensor(sizes, device=points.device, dtype=points.dtype)
    within = sums.gather(0, own[None])[0] / (counts[own] - 1)
    between = sums.gather(0, 1 - own[None])[0] / counts[1 - own]
    return ((between - within) / torch.maximum(within, between).clamp_min(torch.finfo(points.dtype).tiny)).mean()
