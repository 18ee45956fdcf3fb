from __future__ import annotations

import math

import pytest
import torch

from job.numerics.metrics import kl_divergence
from job.numerics.statistics import quantile, upper_mean, wilson_interval
from job.numerics.weight_kernel import WeightKernel


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


def test_the_bound_of_a_mean_is_some_standard_errors_above_it() -> None:
    assert upper_mean([1.0, 2.0, 3.0, 4.0], 0.0) == 2.5
    # The deviation is √(5 / 3), its standard error half of that.
    assert upper_mean([1.0, 2.0, 3.0, 4.0], 2.0) == pytest.approx(2.5 + math.sqrt(5 / 3))
    assert upper_mean([7.0], 3.0) == 7.0
    with pytest.raises(ValueError, match="no values"):
        upper_mean([], 1.0)


def test_a_quantile_is_a_value_that_enough_others_do_not_exceed() -> None:
    values = [5.0, 1.0, 4.0, 2.0, 3.0, 6.0, 9.0, 7.0, 8.0, 10.0]
    assert [quantile(values, share) for share in (0.0, 0.1, 0.5, 0.9, 0.91, 1.0)] == [1.0, 1.0, 5.0, 9.0, 10.0, 10.0]
    assert quantile([3.0], 0.5) == 3.0
    with pytest.raises(ValueError, match="no values"):
        quantile([], 0.5)
