"""Rounding of edited weights that keeps what an edit changes along its directions."""

from __future__ import annotations

import torch
from torch import Tensor

# Corrections stop once this share of what rounding to nearest changed along the directions is left.
_LEFT = 0.02
# Rows between checks of `_LEFT`.
_ROWS = 16


def rounded_along(weight: Tensor, directions: Tensor, dtype: torch.dtype) -> Tensor:
    """Round a weight [d, i], keeping its products with directions [k, d] close to the exact ones; both float64.

    Rounding to nearest undoes a small edit: most weights change by less than half a unit in the last place. Here,
    starting with the rows that have the largest direction entries, a weight goes to its other neighbour where that
    brings its column's products closer to the exact ones. No weight moves by more than one unit in the last place, and
    numbers that `dtype` represents exactly stay unchanged.
    """
    nearest = weight.to(dtype)
    if not nearest.dtype.is_floating_point or torch.finfo(dtype).bits >= 32:
        return nearest
    left = directions @ (nearest.to(weight) - weight)
    enough = _LEFT * left.norm()
    for count, row in enumerate(directions.square().sum(0).argsort(descending=True, stable=True).tolist()):
        if count % _ROWS == 0 and left.norm() <= enough:
            break
        share = directions[:, row]
        step = _step_to_other_neighbour(weight[row], nearest[row])
        step = torch.where((2 * (share @ left) + step * share.square().sum()) * step < 0, step, 0.0)
        left += torch.outer(share, step)
        nearest[row] = (nearest[row].to(weight) + step).to(dtype)
    return nearest


def _step_to_other_neighbour(exact: Tensor, nearest: Tensor) -> Tensor:
    """Return the way from the nearest numbers of a type to those on the other side of the exact ones; 0 if none is."""
    rounded = nearest.to(exact)
    towards = torch.where(rounded > exact, -torch.inf, torch.inf).to(nearest)
    step = torch.nextafter(nearest, towards).to(exact) - rounded
    return torch.where((rounded == exact) | ~step.isfinite(), 0.0, step)
