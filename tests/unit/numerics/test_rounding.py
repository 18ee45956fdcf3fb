"""Rounding that keeps an edit: its effect along the directions, and what it may do to single weights."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from job.numerics.ablation import edit_weight
from job.numerics.rounding import rounded_along
from tests.edits import plain_edit

HALF = (torch.bfloat16, torch.float16)


def weights(seed: int, height: int, width: int, directions: int) -> tuple[Tensor, Tensor]:
    """Return a weight of half precision and orthonormal directions."""
    generator = torch.Generator().manual_seed(seed)
    weight = 0.02 * torch.randn(height, width, generator=generator)
    return weight.to(torch.bfloat16), torch.linalg.qr(
        torch.randn(height, directions, generator=generator, dtype=torch.float64)
    ).Q.mT


@pytest.mark.parametrize("directions", [1, 3])
@pytest.mark.parametrize("strength", [1.0, 0.2, 0.05, 0.01])
def test_a_small_edit_is_as_strong_after_rounding(strength: float, directions: int) -> None:
    weight, basis = weights(0, 768, 200, directions)
    exact = edit_weight(weight, plain_edit(basis, torch.full((directions,), strength)), "none")
    along = basis @ weight.double()

    def strength_of(edited: Tensor) -> float:
        return 1 - float((along * (basis @ edited.double())).sum() / along.square().sum())

    assert strength_of(rounded_along(exact, basis, torch.bfloat16)) == pytest.approx(strength, rel=0.01)
    if strength == 0.01:  # what rounding to nearest makes of it
        assert strength_of(exact.to(torch.bfloat16)) < 0.6 * strength


@given(
    seed=st.integers(0, 10**6),
    height=st.integers(1, 40),
    width=st.integers(1, 20),
    directions=st.integers(1, 3),
    dtype=st.sampled_from(HALF),
    scale=st.sampled_from([1e-30, 1e-6, 1.0, 1e4]),
)
def test_each_weight_becomes_one_of_its_neighbours(
    seed: int, height: int, width: int, directions: int, dtype: torch.dtype, scale: float
) -> None:
    weight, basis = weights(seed, height, width, min(directions, height))
    exact = scale * weight.double() * 1.0123
    rounded, nearest = rounded_along(exact, basis, dtype), exact.to(dtype)
    towards = torch.where(nearest.double() > exact, -torch.inf, torch.inf).to(dtype)
    other = torch.nextafter(nearest, towards)
    assert bool(((rounded == nearest) | (rounded == other)).all())
    left, before = (float((basis @ (found.double() - exact)).norm()) for found in (rounded, nearest))
    assert left <= before * (1 + 1e-9)


@given(seed=st.integers(0, 10**6), dtype=st.sampled_from(HALF))
def test_numbers_that_the_type_has_stay(seed: int, dtype: torch.dtype) -> None:
    weight, basis = weights(seed, 30, 20, 1)
    stored = weight.to(dtype)
    assert torch.equal(rounded_along(stored.double(), basis, dtype), stored)


def test_the_largest_numbers_stay_finite_and_float32_is_rounded_to_nearest() -> None:
    largest = torch.finfo(torch.bfloat16).max
    exact = torch.full((8, 4), largest, dtype=torch.float64) * (1 + 1e-4)
    basis = torch.full((1, 8), 8**-0.5, dtype=torch.float64)
    assert bool(rounded_along(exact, basis, torch.bfloat16).isfinite().all())
    weight = torch.randn(8, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert torch.equal(rounded_along(weight, basis, torch.float32), weight.float())
