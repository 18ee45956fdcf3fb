"""Axes and places of charts."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from job.report.plot import Axis, Chart, Series, layer_axis, linear_axis, log_axis

VALUES = st.lists(st.floats(-1e6, 1e6, allow_subnormal=False), max_size=20)
DIVERGENCES = st.lists(st.one_of(st.just(0.0), st.floats(1e-9, 1e4)), max_size=20)


def assert_shows(axis: Axis, values: list[float]) -> None:
    places = [axis.share(value) for value in values]
    assert all(-1e-9 <= place <= 1 + 1e-9 for place in places)
    assert [axis.share(value) for value in sorted(values)] == sorted(places)
    assert 1 <= len(axis.ticks) <= 10
    assert all(-1e-6 <= axis.share(value) <= 1 + 1e-6 for value, _ in axis.ticks)
    assert len({text for _, text in axis.ticks}) == len(axis.ticks)


@given(VALUES)
def test_a_linear_axis_shows_all_values_in_order(values: list[float]) -> None:
    assert_shows(linear_axis("x", values), values)


@given(DIVERGENCES)
def test_a_logarithmic_axis_shows_all_values_in_order_and_zero_below(values: list[float]) -> None:
    axis = log_axis("KL", values)
    assert_shows(axis, values)
    assert axis.zero == (0.0 in values)
    if axis.zero:
        assert axis.ticks[0] == (0.0, "0")
        assert all(axis.share(value) > axis.share(0.0) for value in values if value)


def test_ticks_are_round_numbers() -> None:
    assert [text for _, text in linear_axis("x", [0.0, 100.0]).ticks] == ["0", "20", "40", "60", "80", "100"]
    assert [text for _, text in linear_axis("x", [0.0, 2.0], whole=True).ticks] == ["0", "1", "2"]
    assert [text for _, text in linear_axis("x", [3.0, 3.0], whole=True).ticks] == ["3", "4"]
    assert [text for _, text in log_axis("KL", [0.002, 9.0]).ticks] == ["0.01", "0.1", "1", "10"]
    assert [text for _, text in log_axis("KL", [0.0, 0.02, 0.04]).ticks] == [
        "0",
        "0.02",
        "0.025",
        "0.03",
        "0.035",
        "0.04",
    ]
    assert [text for _, text in layer_axis(30).ticks] == ["0", "5", "10", "15", "20", "25"]


def test_bars_stand_side_by_side_on_the_floor_and_a_point_without_a_value_is_left_out() -> None:
    both = tuple(Series(name, "bars", 0, [(0.0, 1.0), (1.0, 0.0)]) for name in ("attention", "mlp"))
    chart = Chart("strength", layer_axis(2), linear_axis("strength", [0.0, 1.0], padded=False), both)
    first, second = (chart.bars(series) for series in both)
    _, top, _, bottom = chart.box
    assert (first[0].y, first[0].height, first[1].height) == (pytest.approx(top), pytest.approx(bottom - top), 0.0)
    assert first[0].x + first[0].width == pytest.approx(second[0].x)
    gaps = Series("cosine", "line", 0, [(0.0, None), (1.0, 0.5)], ["a", "b"])
    assert [mark.tip for mark in chart.marks(gaps)] == ["b"]
    assert math.isfinite(chart.marks(gaps)[0].y)
