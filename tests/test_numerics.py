from __future__ import annotations

import math

import pytest
import torch

from job.numerics.directions import mean_difference, project_out, selection
from job.numerics.intervals import wilson_interval
from job.numerics.kernel import WeightKernel
from job.numerics.metrics import kl_divergence


def test_mean_difference_is_the_unit_difference_of_means_per_layer() -> None:
    good, bad = torch.randn(7, 3, 16), torch.randn(5, 3, 16) + 1
    found = mean_difference(good, bad)
    expected = torch.nn.functional.normalize(bad.mean(0) - good.mean(0), dim=-1)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected)


def test_mean_difference_survives_low_precision_and_massive_activations() -> None:
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(400, 1, 64, generator=generator)
    base[:, :, 3] += 3e4  # a massive activation, the same in both classes
    shift = torch.zeros(64)
    shift[10] = 0.5
    found = mean_difference(base[:200], base[:200] + shift)
    assert abs(float(found[0, 10])) > 0.99


def test_orthogonalised_directions_have_nothing_of_the_good_mean() -> None:
    good, bad = torch.randn(7, 3, 16) + 2, torch.randn(5, 3, 16)
    found = mean_difference(good, bad, orthogonalize=True)
    mean = torch.nn.functional.normalize(good.mean(0), dim=-1)
    assert float((found * mean).sum(-1).abs().max()) < 1e-5


def test_equal_classes_have_no_direction() -> None:
    same = torch.randn(4, 2, 8)
    with pytest.raises(ValueError, match="layer 0"):
        mean_difference(same, same)
    with pytest.raises(ValueError, match="of one model"):
        mean_difference(same, torch.randn(4, 3, 8))


def test_project_out_leaves_zero_references_alone() -> None:
    vectors = torch.randn(2, 8)
    assert torch.equal(project_out(vectors, torch.zeros(2, 8)), vectors)


def test_selection_interpolates_to_a_unit_vector() -> None:
    directions = torch.nn.functional.normalize(torch.randn(4, 8), dim=1).double()
    assert torch.equal(selection(directions, None, 2), torch.tensor([0, 0, 1, 0], dtype=torch.float64))
    torch.testing.assert_close(selection(directions, 3.0, 0), torch.tensor([0, 0, 0, 1], dtype=torch.float64))
    between = selection(directions, 1.25, 0)
    expected = torch.nn.functional.normalize(0.75 * directions[1] + 0.25 * directions[2], dim=0)
    torch.testing.assert_close(between @ directions, expected)
    with pytest.raises(ValueError, match="outside"):
        selection(directions, 3.5, 0)


def test_kernel_falls_off_linearly_and_ends() -> None:
    kernel = WeightKernel(max_weight=1.0, max_weight_position=5.0, min_weight=0.2, min_weight_distance=4.0)
    assert kernel.strength(5) == 1.0
    assert kernel.strength(3) == pytest.approx(0.6)
    assert kernel.strength(9) == pytest.approx(0.2)
    assert kernel.strength(10) == 0.0


def test_kl_divergence_agrees_with_torch_and_bears_impossible_tokens() -> None:
    base, edited = torch.randn(6, 30).log_softmax(-1), torch.randn(6, 30)
    expected = torch.nn.functional.kl_div(edited.log_softmax(-1), base, log_target=True, reduction="batchmean")
    assert float(kl_divergence(base, edited).mean()) == pytest.approx(float(expected), rel=1e-5)
    certain = torch.tensor([[0.0, -math.inf]])
    assert float(kl_divergence(certain, torch.tensor([[0.0, -math.inf]]))[0]) == 0
    assert math.isinf(float(kl_divergence(certain, torch.tensor([[-math.inf, 0.0]]))[0]))


def test_wilson_interval_at_known_points() -> None:
    # Newcombe 1998, table I: 81 of 263 and 0 of 20.
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert wilson_interval(0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)
    with pytest.raises(ValueError, match="no interval"):
        wilson_interval(1, 0)
