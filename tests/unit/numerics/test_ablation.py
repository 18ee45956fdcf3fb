"""The edit of outputs equals the edit of weights, in every mode and at every rank."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from job.numerics.ablation import (
    DEGENERATE_SHARE,
    DegenerateEditError,
    RowNormalization,
    WriterEdit,
    ablate,
    edit_bias,
    edit_weight,
    project,
    weight_products,
    write_metric,
)
from tests.edits import plain_edit

MODES: tuple[RowNormalization, ...] = ("none", "pre", "full", "column")
D, I = 12, 9  # noqa: E741 - the letters of the legend in job.numerics.ablation


def compiled(
    weight: Tensor,
    candidates: Tensor,
    mode: RowNormalization,
    mix: Tensor,
    strengths: Tensor,
    metric: Tensor | None = None,
) -> WriterEdit:
    """Compile an edit from the weight's products only."""
    products = weight_products(weight, candidates, mode, metric)
    return ablate(products, project(products, candidates, mix), strengths)


@st.composite
def cases(draw: st.DrawFn, dual: bool = False) -> Any:
    """Draw a weight, an edit of it, and inputs; `dual` adds the metric of a norm with random gains, else None."""
    mode = draw(st.sampled_from(MODES))
    k = draw(st.integers(1, 3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    weight = torch.randn(D, I, generator=generator, dtype=torch.float64)
    # Rows and columns of very different norms, like trained weights.
    weight *= torch.exp(torch.randn(D, 1, generator=generator)) * torch.exp(torch.randn(1, I, generator=generator))
    candidates = torch.randn(5, D, generator=generator, dtype=torch.float64)
    mixed = torch.randn(k, 5, generator=generator, dtype=torch.float64)
    directions = mixed @ candidates
    spread = draw(st.sampled_from([0.1, 0.5, 1.0]))
    metric = write_metric(torch.exp(spread * torch.randn(D, generator=generator))) if dual else None
    # Orthonormalise by a linear map of the combinations, so that tables by candidate still apply.
    upper = torch.linalg.cholesky((directions if metric is None else directions * metric) @ directions.T)
    coefficients = torch.linalg.solve_triangular(upper, mixed, upper=False)
    strengths = torch.tensor(draw(st.lists(st.floats(0, 1.5), min_size=k, max_size=k)), dtype=torch.float64)
    bias = torch.randn(D, generator=generator, dtype=torch.float64)
    x = torch.randn(4, I, generator=generator, dtype=torch.float64)
    return (mode, weight, candidates, coefficients, strengths, bias, x, *([metric] if dual else []))


@settings(max_examples=300)
@given(st.one_of(cases().map(lambda case: (*case, None)), cases(dual=True)))
def test_edited_output_equals_output_of_edited_weight_and_bias(case) -> None:
    mode, weight, candidates, coefficients, strengths, bias, x, metric = case
    edit = compiled(weight, candidates, mode, coefficients, strengths, metric)
    if edit.least_share < 1e-3:  # near the refused cases rounding of the inputs dominates
        return
    by_definition = plain_edit(coefficients @ candidates, strengths, metric)
    edited = x @ edit_weight(weight, by_definition, mode).T
    edited = edited + edit_bias(bias, weight, by_definition, mode)
    scaled = x if edit.input_scale is None else x * edit.input_scale
    hooked = edit.apply(scaled @ weight.T + bias)
    torch.testing.assert_close(hooked, edited, rtol=1e-6, atol=1e-8)


@settings(max_examples=100)
@given(cases(dual=True))
def test_full_keeps_row_norms_and_column_keeps_column_norms(case) -> None:
    _, weight, candidates, coefficients, strengths, _, _, metric = case
    directions = coefficients @ candidates
    for mode, axis in (("full", 1), ("column", 0)):
        for written in (None, metric):
            try:
                edited = edit_weight(weight, plain_edit(directions, strengths, written), mode)
            except DegenerateEditError:
                continue
            torch.testing.assert_close(edited.norm(dim=axis), weight.norm(dim=axis), rtol=1e-6, atol=0)


@settings(max_examples=50)
@given(st.sampled_from([0.0, 0.3, 1.0, 2.0]), st.integers(0, 2**31))
def test_the_dual_write_removes_what_is_read_behind_a_norm_and_moves_the_stream_least(spread: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    gain = torch.exp(spread * torch.randn(D, generator=generator, dtype=torch.float64))
    gain *= torch.where(torch.rand(D, generator=generator) < 0.5, -1.0, 1.0)
    metric, direction = write_metric(gain), torch.randn(D, generator=generator, dtype=torch.float64)
    read = gain * direction
    y = torch.randn(7, D, generator=generator, dtype=torch.float64)

    def moved(factors: Tensor) -> Tensor:
        write = read * factors / (read * read * factors).sum()
        behind = gain * (y - (y @ read)[:, None] * write)
        torch.testing.assert_close(behind @ direction, torch.zeros(7, dtype=torch.float64), rtol=0, atol=1e-9)
        return (behind - gain * y).norm(dim=-1)

    dual = moved(metric)
    least = ((gain * y) @ direction).abs() / direction.norm()
    relative = gain.abs() / gain.square().mean().sqrt()
    if relative.min() > 0.1:  # no gain is so small that it is raised
        torch.testing.assert_close(dual, least)
    assert bool((least <= dual * (1 + 1e-9)).all())
    assert bool((dual <= moved(torch.ones(D)) * (1 + 1e-9)).all())


def test_gains_of_zero_and_small_ones_are_raised_to_a_tenth_of_the_root_mean_square() -> None:
    metric = write_metric(torch.tensor([0.0, 0.001, -0.001, 1.0, -2.0]))
    assert bool((metric <= 100).all())
    assert metric[0] == metric[1] == metric[2] == pytest.approx(100)
    assert metric[3] / metric[4] == pytest.approx(4)
    assert torch.equal(write_metric(torch.zeros(3)), torch.ones(3, dtype=torch.float64))


@settings(max_examples=50)
@given(cases())
def test_ablating_wholly_removes_the_directions_and_is_idempotent(case) -> None:
    _, weight, candidates, coefficients, strengths, _, _ = case
    directions, ones = coefficients @ candidates, torch.ones_like(strengths)
    whole = plain_edit(directions, ones)
    once = edit_weight(weight, whole, "none")
    torch.testing.assert_close(directions @ once, torch.zeros(len(ones), I, dtype=torch.float64), rtol=0, atol=1e-9)
    torch.testing.assert_close(edit_weight(once, whole, "none"), once)


@pytest.mark.parametrize("mode", MODES)
def test_no_strength_changes_nothing_at_all(mode: RowNormalization) -> None:
    weight, direction = torch.randn(D, I), torch.nn.functional.normalize(torch.randn(1, D), dim=1)
    edit = compiled(weight, direction, mode, torch.eye(1), torch.zeros(1))
    y = torch.randn(3, D, dtype=torch.float64)
    assert torch.equal(edit.apply(y), y)
    if edit.input_scale is not None:
        assert torch.equal(edit.input_scale, torch.ones(I, dtype=torch.float64))


@pytest.mark.parametrize("mode", ["pre", "full"])
def test_zero_rows_stay_zero(mode: RowNormalization) -> None:
    weight = torch.randn(D, I, dtype=torch.float64)
    weight[3] = 0
    direction = torch.nn.functional.normalize(torch.randn(1, D, dtype=torch.float64), dim=1)
    edited = edit_weight(weight, plain_edit(direction, torch.ones(1)), mode)
    edit = compiled(weight, direction, mode, torch.eye(1), torch.ones(1))
    x, bias = torch.randn(4, I, dtype=torch.float64), torch.randn(D, dtype=torch.float64)
    edited_bias = edit_bias(bias, weight, plain_edit(direction, torch.ones(1)), mode)
    torch.testing.assert_close(edit.apply(x @ weight.T + bias), x @ edited.T + edited_bias)
    assert torch.equal(edited[3], torch.zeros(I, dtype=torch.float64))
    assert edited_bias[3] == bias[3]


def test_zero_columns_stay_zero() -> None:
    weight = torch.randn(D, I, dtype=torch.float64)
    weight[:, 2] = 0
    direction = torch.nn.functional.normalize(torch.randn(1, D, dtype=torch.float64), dim=1)
    edit = compiled(weight, direction, "column", torch.eye(1), torch.ones(1))
    assert edit.input_scale is not None
    assert edit.input_scale[2] == 1
    edited = edit_weight(weight, plain_edit(direction, torch.ones(1)), "column")
    assert torch.equal(edited[:, 2], torch.zeros(D, dtype=torch.float64))


def test_a_row_that_the_edit_annihilates_is_refused_by_both() -> None:
    weight = torch.zeros(D, I, dtype=torch.float64)
    weight[0, 0] = 2.0  # the row's only component is the direction
    direction = torch.zeros(1, D, dtype=torch.float64)
    direction[0, 0] = 1.0
    edit = compiled(weight, direction, "full", torch.eye(1), torch.ones(1))
    assert edit.least_share < DEGENERATE_SHARE
    with pytest.raises(DegenerateEditError, match="row 0"):
        edit_weight(weight, plain_edit(direction, torch.ones(1)), "full")


def test_a_column_that_the_edit_annihilates_is_refused_by_both() -> None:
    weight = torch.randn(D, I, dtype=torch.float64)
    direction = torch.nn.functional.normalize(weight[:, 4], dim=0)[None]
    edit = compiled(weight, direction, "column", torch.eye(1), torch.ones(1))
    assert edit.least_share < DEGENERATE_SHARE
    with pytest.raises(DegenerateEditError, match="column 4"):
        edit_weight(weight, plain_edit(direction, torch.ones(1)), "column")


def test_many_edits_at_once_equal_one_after_another() -> None:
    weight, candidates = torch.randn(D, I), torch.nn.functional.normalize(torch.randn(5, D), dim=1)
    chosen, strengths = torch.eye(5)[[1, 4, 2]][:, None], torch.tensor([[0.3], [1.0], [1.4]])
    for mode in MODES:
        together = compiled(weight, candidates, mode, chosen, strengths)
        for index in range(3):
            alone = compiled(weight, candidates, mode, chosen[index], strengths[index])
            y = torch.randn(2, D, dtype=torch.float64)
            picked = y - (y @ together.output_read[index].T) @ together.output_write[index]
            if together.output_scale is not None:
                picked = picked * together.output_scale[index]
            torch.testing.assert_close(picked, alone.apply(y))
