"""Directions that mediate a behaviour, found from residuals. Legend: n prompts, layers, d the residual width."""

from __future__ import annotations

import torch
from torch import Tensor


def mean_difference(good: Tensor, bad: Tensor, *, orthogonalize: bool = False) -> Tensor:
    """Return the unit difference of class means per layer (Arditi et al. 2024), [layers, d], float32.

    Means are taken in float64, so that neither low precision nor massive activations move them.

    Args:
        good: Residuals of prompts without the behaviour, [n_good, layers, d], any dtype and device.
        bad: Residuals of prompts with the behaviour, [n_bad, layers, d].
        orthogonalize: Take the good mean's direction out of the difference.

    Raises:
        ValueError: The shapes do not agree, or the classes do not differ in some layer.
    """
    if good.ndim != 3 or bad.ndim != 3 or good.shape[1:] != bad.shape[1:]:
        raise ValueError(
            f"residuals must be [n, layers, d] of one model, got {tuple(good.shape)} and {tuple(bad.shape)}"
        )
    good_mean = good.to(torch.float64).mean(0)
    difference = bad.to(torch.float64).mean(0) - good_mean
    if orthogonalize:
        difference = project_out(difference, good_mean)
    norms = difference.norm(dim=-1, keepdim=True)
    if not bool((norms > 0).all()):
        layer = int((~(norms[:, 0] > 0)).nonzero()[0, 0])
        raise ValueError(f"good and bad residuals do not differ in layer {layer}")
    unit: Tensor = difference / norms
    return unit.to(torch.float32)


def project_out(vectors: Tensor, reference: Tensor) -> Tensor:
    """Return vectors [layers, d] without their component along reference [layers, d], layer by layer."""
    squared = (reference * reference).sum(-1, keepdim=True)
    along = (vectors * reference).sum(-1, keepdim=True) / squared.clamp_min(torch.finfo(squared.dtype).tiny)
    return vectors - along * reference


def selection(directions: Tensor, index: float | None, layer: int) -> Tensor:
    """Return the unit direction to ablate in a layer as a combination of all layers' directions.

    Args:
        directions: A unit direction for each layer, [layers, d].
        index: The layer whose direction is ablated everywhere, interpolated linearly where fractional;
            None for each layer's own.
        layer: The layer that is edited.

    Returns:
        Coefficients [layers], float64, on the CPU.

    Raises:
        ValueError: The index lies outside 0 … layers - 1.
    """
    layers = len(directions)
    coefficients = torch.zeros(layers, dtype=torch.float64)
    if index is None:
        coefficients[layer] = 1
        return coefficients
    if not 0 <= index <= layers - 1:
        raise ValueError(f"direction index {index} is outside 0 … {layers - 1}")
    lower = min(int(index), layers - 1)
    coefficients[lower] += 1 - (index - lower)
    coefficients[min(lower + 1, layers - 1)] += index - lower
    used = directions[lower : lower + 2].to(coefficients)
    norm = (coefficients[lower : lower + 2] @ used).norm()
    unit: Tensor = coefficients / norm.clamp_min(torch.finfo(torch.float64).tiny)
    return unit
