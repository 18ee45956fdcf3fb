"""Directions that mediate a behaviour, found from residuals.

Legend of shapes: n prompts, m = n_good + n_bad, layers, d the residual width, k directions a layer.
All arithmetic is in float64, a few layers at a time, on the device of the residuals.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

PcaMethod = Literal["auto", "full", "randomized"]

# Eigenvalues of the Gram matrix below this share of the largest are rounding errors; they would give NaN.
_NULL_SHARE = 1e-12
# Eigenvalues of the contrast below this share of the largest absolute one are rounding errors.
_LEAST_SHARE = 1e-9
# Randomised solver: extra columns of the sketch, and powers of the operator in its basis.
_OVERSAMPLING, _POWERS = 8, 6
_MEMORY = 2 << 30


@dataclass(frozen=True)
class Directions:
    """Directions of all layers, as a solver returns them.

    Attributes:
        directions: Unit directions, by falling eigenvalue, [layers, k, d], float32; zero rows pad layers with fewer.
        eigenvalues: Rank of each direction, [layers, k], float64; 0 for zero rows and for fallbacks.
        fallbacks: Layers without a solution; their only direction is the mean difference.
    """

    directions: Tensor
    eigenvalues: Tensor
    fallbacks: tuple[int, ...] = ()


# Solves one or several layers [n, layers, d]: eigenvalues [layers, k] and vectors [layers, k, d].
_Solver = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def mean_difference(good: Tensor, bad: Tensor, *, orthogonalize: bool = False) -> Tensor:
    """Return the unit difference of class means per layer (Arditi et al. 2024), [layers, d], float32.

    Means are taken in float64, robust to low precision and massive activations.

    Args:
        good: Residuals of prompts without the behaviour, [n_good, layers, d], any dtype and device.
        bad: Residuals of prompts with the behaviour, [n_bad, layers, d].
        orthogonalize: Project the good mean out of the difference ("projected" directions).

    Raises:
        ValueError: Shapes differ, or the class means are equal in some layer.
    """
    _check_shapes(good, bad)
    unit = torch.empty(good.shape[1:], dtype=torch.float32, device=good.device)
    for layer in range(good.shape[1]):
        good_mean = good[:, layer].to(torch.float64).mean(0)
        difference = bad[:, layer].to(torch.float64).mean(0) - good_mean
        if orthogonalize:
            difference = project_out(difference[None], good_mean[None])[0]
        # Scaled by the largest entry first: the square of a huge entry would overflow.
        largest = difference.abs().max()
        if not bool(largest > 0):
            raise ValueError(f"good and bad residuals do not differ in layer {layer}")
        difference = difference / largest
        unit[layer] = (difference / difference.norm()).to(torch.float32)
    return unit


# Long: most of it is the docstring.
def contrastive_pca(
    good: Tensor,
    bad: Tensor,
    *,
    n_components: int = 3,
    alpha: float = 1.0,
    method: PcaMethod = "auto",
    seed: int = 0,
    memory: int = _MEMORY,
) -> Directions:
    """Return the top eigenvectors of ``cov(bad) - alpha cov(good)`` per layer (Abid et al. 2018).

    The contrast has rank m - 2 at most, so sample space (m × m) holds an exact equivalent of the d × d problem;
    ``auto`` solves it wherever m < d. Covariances exclude the class means: these directions complement the mean
    difference, they do not replace it. Directions without a positive eigenvalue become zero rows. A layer without any,
    or whose solver fails, falls back to the mean difference.

    Args:
        good: Residuals of prompts without the behaviour, [n_good, layers, d], any dtype and device.
        bad: Residuals of prompts with the behaviour, [n_bad, layers, d].
        n_components: Directions per layer, k.
        alpha: Weight of the good covariance.
        method: ``auto`` (exact, in the smaller space), ``full`` (exact, d × d) or ``randomized`` (Rayleigh-Ritz on a
            random block Krylov space of the contrast).
        seed: Seed of the randomised method.
        memory: Bytes of working memory; at least one layer is solved at a time.

    Raises:
        ValueError: Shapes differ, a class has fewer than two prompts, or an argument is out of range.
    """
    _check_shapes(good, bad)
    if min(len(good), len(bad)) < 2:
        raise ValueError("a covariance needs at least two prompts of each class")
    if n_components < 1 or alpha < 0:
        raise ValueError(f"n_components must be at least 1 and alpha at least 0, got {n_components} and {alpha}")
    samples, width = len(good) + len(bad), good.shape[2]
    if method == "full" or (method == "auto" and width <= samples):
        need = 8 * (4 * width * width + 2 * samples * width)

        def solve(good: Tensor, bad: Tensor) -> tuple[Tensor, Tensor]:
            return _full(_scaled(good, bad), len(good), alpha, n_components)

    elif method == "auto":
        need = 8 * (3 * samples * width + 6 * samples * samples)

        def solve(good: Tensor, bad: Tensor) -> tuple[Tensor, Tensor]:
            return _sample_space(_scaled(good, bad), len(good), alpha, n_components)

    elif method == "randomized":
        need = 8 * 3 * samples * width

        def solve(good: Tensor, bad: Tensor) -> tuple[Tensor, Tensor]:
            return _randomized(_scaled(good, bad), len(good), alpha, n_components, seed)

    else:
        raise ValueError(f"unknown method {method!r}: choose auto, full or randomized")
    return _solve_layers(good, bad, n_components, solve, max(1, memory // need))


def probe(good: Tensor, bad: Tensor, *, regularization: float = 1.0, memory: int = _MEMORY) -> Directions:
    """Return the regularised linear discriminant of the two classes per layer (Friedman 1989).

    It is ``(S + ρI)⁻¹ (mean(bad) - mean(good))`` with S the pooled within-class covariance and ρ = regularization ·
    tr(S) / d, solved in sample space. It discounts what varies within both classes. The eigenvalue is the squared
    Mahalanobis distance of the means.

    Args:
        good: Residuals of prompts without the behaviour, [n_good, layers, d], any dtype and device.
        bad: Residuals of prompts with the behaviour, [n_bad, layers, d].
        regularization: Weight of the identity; large values approach the mean difference.
        memory: Bytes of working memory; at least one layer is solved at a time.

    Raises:
        ValueError: Shapes differ, a class has fewer than two prompts, or regularization is not positive.
    """
    _check_shapes(good, bad)
    if min(len(good), len(bad)) < 2:
        raise ValueError("a covariance needs at least two prompts of each class")
    if regularization <= 0:
        raise ValueError(f"regularization must be positive, got {regularization}")
    samples, width = len(good) + len(bad), good.shape[2]

    def solve(good: Tensor, bad: Tensor) -> tuple[Tensor, Tensor]:
        return _discriminant(good, bad, regularization)

    need = 8 * (3 * samples * width + 3 * samples * samples)
    return _solve_layers(good, bad, 1, solve, max(1, memory // need))


def winsorize(residuals: Tensor, quantile: float) -> Tensor:
    """Clamp every residual vector [n, layers, d] to a quantile of its absolute entries; 1 changes nothing.

    A few massive activations then no longer dominate a mean or variance. Raises ValueError outside (0, 1].
    """
    if not 0 < quantile <= 1:
        raise ValueError(f"the quantile must be in (0, 1], got {quantile}")
    if quantile == 1:
        return residuals
    clamped = torch.empty_like(residuals)
    for index, vectors in enumerate(residuals):
        bound = torch.quantile(vectors.to(torch.float32).abs(), quantile, dim=-1, keepdim=True).to(vectors)
        clamped[index] = torch.minimum(torch.maximum(vectors, -bound), bound)
    return clamped


def project_out(vectors: Tensor, reference: Tensor) -> Tensor:
    """Project reference [layers, d] out of vectors [layers, d], layer by layer."""
    squared = (reference * reference).sum(-1, keepdim=True)
    along = (vectors * reference).sum(-1, keepdim=True) / squared.clamp_min(torch.finfo(squared.dtype).tiny)
    return vectors - along * reference


def _check_shapes(good: Tensor, bad: Tensor) -> None:
    if good.ndim != 3 or bad.ndim != 3 or good.shape[1:] != bad.shape[1:]:
        raise ValueError(
            f"residuals must be [n, layers, d] of one model, got {tuple(good.shape)} and {tuple(bad.shape)}"
        )


def _solve_layers(good: Tensor, bad: Tensor, k: int, solve: _Solver, at_once: int) -> Directions:
    layers, width = good.shape[1:]
    directions = torch.zeros(layers, k, width, dtype=torch.float32, device=good.device)
    eigenvalues = torch.zeros(layers, k, dtype=torch.float64, device=good.device)
    fallbacks = []
    for chosen, solution in _solutions(good, bad, solve, at_once):
        if solution is not None:
            values, vectors = _oriented(good, bad, chosen, *solution)
            directions[chosen, : vectors.shape[1]] = vectors.to(torch.float32)
            eigenvalues[chosen, : values.shape[1]] = values
        for layer in chosen:
            if not bool(eigenvalues[layer, 0] > 0):
                directions[layer, 0] = mean_difference(good[:, layer, None], bad[:, layer, None])[0]
                fallbacks.append(layer)
    return Directions(directions, eigenvalues, tuple(fallbacks))


def _solutions(
    good: Tensor, bad: Tensor, solve: _Solver, at_once: int
) -> Iterator[tuple[list[int], tuple[Tensor, Tensor] | None]]:
    """Yield layers with their solution; layers of a failed batch singly, with None if they fail again."""
    pending = [list(range(i, min(i + at_once, good.shape[1]))) for i in range(0, good.shape[1], at_once)]
    while pending:
        chosen = pending.pop(0)
        try:
            solution = solve(good[:, chosen].to(torch.float64), bad[:, chosen].to(torch.float64))
            failed = not all(bool(tensor.isfinite().all()) for tensor in solution)
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]  # it is there, only not declared
            failed = True
        if not failed:
            yield chosen, solution
        elif len(chosen) == 1:
            yield chosen, None
        else:
            pending = [[layer] for layer in chosen] + pending


def _oriented(good: Tensor, bad: Tensor, chosen: list[int], values: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Flip directions to point from good to bad, so that adjacent layers can be interpolated."""
    difference = bad[:, chosen].to(torch.float64).mean(0) - good[:, chosen].to(torch.float64).mean(0)
    along = (vectors @ difference[:, :, None])[..., 0]
    return values, torch.where((along < 0)[..., None], -vectors, vectors)


def _scaled(good: Tensor, bad: Tensor) -> Tensor:
    """Return centred rows whose squares sum to the class covariances, [layers, m, d]; good first."""
    centred = [(group - group.mean(0)) / (len(group) - 1) ** 0.5 for group in (good, bad)]
    return torch.cat(centred).transpose(0, 1)


def _signs(rows: Tensor, n_good: int, alpha: float) -> Tensor:
    signs = rows.new_ones(rows.shape[1])
    signs[:n_good] = -alpha
    return signs


def _full(rows: Tensor, n_good: int, alpha: float, k: int) -> tuple[Tensor, Tensor]:
    contrast = rows.mT @ (rows * _signs(rows, n_good, alpha)[:, None])
    values, vectors = torch.linalg.eigh((contrast + contrast.mT) / 2)
    return _positive(values, vectors.mT, k)


def _sample_space(rows: Tensor, n_good: int, alpha: float, k: int) -> tuple[Tensor, Tensor]:
    """Solve the d × d problem through the rows' Gram matrix (docs/decisions/0007-directions.md)."""
    values, vectors = torch.linalg.eigh(rows @ rows.mT)
    nonzero = values > _NULL_SHARE * values[:, -1:]
    root = torch.where(nonzero, values.clamp_min(0).sqrt(), 0.0)
    inverse = torch.where(nonzero, values.clamp_min(torch.finfo(values.dtype).tiny).rsqrt(), 0.0)
    half = vectors * root[:, None]
    values, inner = torch.linalg.eigh(half.mT @ (half * _signs(rows, n_good, alpha)[:, None]))
    inner = inner[..., -k:]
    largest = values.abs().amax(-1)
    mapped = (vectors @ (inner * inverse[..., None])).mT @ rows
    return _positive(values[:, -k:], mapped, k, largest)


def _randomized(rows: Tensor, n_good: int, alpha: float, k: int, seed: int) -> tuple[Tensor, Tensor]:
    """Solve by Rayleigh-Ritz in the block Krylov space of the contrast (Musco and Musco 2015).

    The projected problem keeps the contrast's signs, so large negative eigenvalues are not mistaken for directions.
    """
    generator = torch.Generator().manual_seed(seed)
    signs = _signs(rows, n_good, alpha)[:, None]
    start = torch.randn(rows.shape[2], k + _OVERSAMPLING, generator=generator, dtype=torch.float64)
    block = start.to(rows.device).expand(len(rows), -1, -1)
    blocks = []
    for _ in range(_POWERS):
        block = torch.linalg.qr(rows.mT @ (signs * (rows @ block))).Q
        blocks.append(block)
    basis = torch.linalg.qr(torch.cat(blocks, dim=-1)).Q[..., : rows.shape[1]]
    projected = rows @ basis
    values, inner = torch.linalg.eigh(projected.mT @ (signs * projected))
    return _positive(values, (basis @ inner[..., -k:]).mT, k)


def _positive(values: Tensor, vectors: Tensor, k: int, largest: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the top k positive eigenvalues, falling, and their unit vectors; zeros in place of others.

    `values` [layers, r] rise; `largest` is the largest absolute eigenvalue if they lack it.
    """
    largest = values.abs().amax(-1) if largest is None else largest
    values, vectors = values[:, -k:].flip(-1), vectors[:, -k:].flip(-2)
    positive = values > _LEAST_SHARE * largest[:, None]
    vectors = torch.nn.functional.normalize(vectors, dim=-1)
    return torch.where(positive, values, 0.0), torch.where(positive[..., None], vectors, 0.0)


def _discriminant(good: Tensor, bad: Tensor, regularization: float) -> tuple[Tensor, Tensor]:
    """Solve ``(S + ρI) w = δ`` by the Woodbury identity, with S = ZᵀZ / (m - 2)."""
    freedom = len(good) + len(bad) - 2
    rows = torch.cat([group - group.mean(0) for group in (good, bad)]).transpose(0, 1) / max(freedom, 1) ** 0.5
    difference = (bad.mean(0) - good.mean(0))[..., None]  # [layers, d, 1]
    gram = rows @ rows.mT
    ridge = regularization * gram.diagonal(dim1=-2, dim2=-1).sum(-1) / rows.shape[2]
    # Without within-class spread, the discriminant is the difference itself.
    ridge = torch.where(ridge > 0, ridge, 1.0)[:, None, None]
    factor = torch.linalg.cholesky(gram + ridge * torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device))
    solved = (difference - rows.mT @ torch.cholesky_solve(rows @ difference, factor)) / ridge
    distance = (difference * solved).sum(1)
    return distance, torch.nn.functional.normalize(solved, dim=1).mT
