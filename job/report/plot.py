"""Plots as values: axes with ticks, series and their places in an SVG, which chart.html draws."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

WIDTH = 640.0
# Room for ticks and titles in the largest size of text, which phones get.
LEFT, RIGHT, TOP, BOTTOM = 84.0, 12.0, 44.0, 66.0
_MOST_TICKS = 6
# A logarithmic axis ends here, and has a place below for 0.
_LEAST = 1e-6
_ZERO_SHARE = 0.1
# Room left free at both ends of an axis, so that no mark is cut.
_PADDING = 0.04

Kind = Literal["dots", "line", "bars", "crosses", "star", "diamond"]


@dataclass(frozen=True)
class Axis:
    """An axis.

    Attributes:
        ticks: Values with their texts.
        log: Logarithmic.
        zero: Logarithmic with a place for 0 at the low end.
    """

    title: str
    low: float
    high: float
    ticks: tuple[tuple[float, str], ...]
    log: bool = False
    zero: bool = False

    def share(self, value: float) -> float:
        """Return a value's position: 0 at the low end, 1 at the high end."""
        if not self.log:
            return (value - self.low) / (self.high - self.low)
        start = _ZERO_SHARE if self.zero else 0.0
        if value <= 0 and self.zero:
            return _PADDING
        span = math.log(self.high / self.low)
        return start + (1 - start) * math.log(max(value, _LEAST) / self.low) / span


def linear_axis(title: str, values: Sequence[float], *, padded: bool = True, whole: bool = False) -> Axis:
    """Return a linear axis over values.

    `padded` leaves room beyond the outermost ones; `whole` numbers have no ticks between them.
    """
    low, high = min(values, default=0.0), max(values, default=1.0)
    if high - low < 1e-9 * max(1.0, abs(high)):
        high = low + 1.0
    room = _PADDING * (high - low) if padded else 0.0
    ticks = tuple((value, f"{value:.12g}") for value in _ticks(low - room, high + room, 1.0 if whole else 0.0))
    return Axis(title, low - room, high + room, ticks)


def log_axis(title: str, values: Sequence[float]) -> Axis:
    """Return a logarithmic axis over values, those of 0 at a place of their own."""
    positive = [max(value, _LEAST) for value in values if value > 0] or [_LEAST, 1.0]
    low, high = min(positive), max(positive)
    room = max(math.log(high / low), math.log(2)) * _PADDING
    low, high = low / math.exp(room), high * math.exp(room)
    ticks = [(value, f"{value:.12g}") for value in _log_ticks(low, high)]
    zero = any(value <= 0 for value in values)
    return Axis(title, low, high, ((0.0, "0"), *ticks) if zero else tuple(ticks), log=True, zero=zero)


def layer_axis(layers: int) -> Axis:
    """Return an axis of layer numbers."""
    step = next(step for step in (1, 2, 5, 10, 20, 50, 100, layers) if layers <= 13 * step or step == layers)
    ticks = tuple((float(layer), str(layer)) for layer in range(0, layers, step))
    return Axis("layer", -0.6, layers - 0.4, ticks)


def _ticks(low: float, high: float, least_step: float = 0.0) -> list[float]:
    step = max(_step((high - low) / (_MOST_TICKS + 1)), least_step)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    decimals = 1 - math.floor(math.log10(step))
    return [round(index * step, decimals) for index in range(first, last + 1)]


def _step(least: float) -> float:
    power = 10.0 ** math.floor(math.log10(least))
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= least * (1 - 1e-9))


def _log_ticks(low: float, high: float) -> list[float]:
    if high / low < 5:
        return _ticks(low, high)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1,) if high / low > 300 else (1, 2, 5)
    found = [float(f"{factor}e{power}") for power in powers for factor in factors]
    shown = [value for value in found if low <= value <= high]
    return shown[:: max(1, math.ceil(len(shown) / (_MOST_TICKS + 1)))]


@dataclass(frozen=True)
class Series:
    """Points of one kind.

    Attributes:
        look: Number of its colour and dashes in page.css.
        points: x and y; a point without y is not drawn.
        tips: Texts of the points, shown under the mouse; empty for none.
        label: Text beside the first point.
        ids: Numbers by which buttons find the points; empty for none.
    """

    name: str
    kind: Kind
    look: int
    points: Sequence[tuple[float, float | None]]
    tips: Sequence[str] = ()
    label: str = ""
    ids: Sequence[int] = ()


@dataclass(frozen=True)
class Mark:
    """A drawn point with its text and number, None for none; `width` and `height` are a bar's."""

    x: float
    y: float
    tip: str
    number: int | None
    width: float = 0.0
    height: float = 0.0


@dataclass(frozen=True)
class Chart:
    """A chart; `rules` are horizontal lines by value and text."""

    name: str
    x: Axis
    y: Axis
    series: tuple[Series, ...]
    rules: tuple[tuple[float, str], ...] = ()
    height: float = 340.0

    @property
    def width(self) -> float:
        """Width of the drawing."""
        return WIDTH

    @property
    def box(self) -> tuple[float, float, float, float]:
        """Left, top, right and bottom of the area of the points."""
        return LEFT, TOP, WIDTH - RIGHT, self.height - BOTTOM

    def across(self, value: float) -> float:
        """Return a value's horizontal position."""
        left, _, right, _ = self.box
        return left + (right - left) * self.x.share(value)

    def up(self, value: float) -> float:
        """Return a value's vertical position."""
        _, top, _, bottom = self.box
        return bottom - (bottom - top) * self.y.share(value)

    def marks(self, series: Series) -> list[Mark]:
        """Return a series' points with their places."""
        tips = series.tips or [""] * len(series.points)
        numbers: Sequence[int | None] = series.ids or [None] * len(series.points)
        return [
            Mark(self.across(x), self.up(y), tip, number)
            for (x, y), tip, number in zip(series.points, tips, numbers, strict=True)
            if y is not None
        ]

    def bars(self, series: Series) -> list[Mark]:
        """Return a series' bars, beside those of the other series."""
        groups = [one for one in self.series if one.kind == "bars"]
        width = (self.across(1) - self.across(0)) * 0.8 / len(groups)
        floor, first = self.up(self.y.low), -len(groups) / 2 + groups.index(series)
        return [
            Mark(one.x + first * width, one.y, one.tip, None, width, max(floor - one.y, 0.0))
            for one in self.marks(series)
        ]

    def line(self, series: Series) -> str:
        """Return the path through a series' points."""
        return "M" + "L".join(f"{one.x:.1f} {one.y:.1f}" for one in self.marks(series))

    def crosses(self, series: Series) -> str:
        """Return a path of crosses at a series' points."""
        return "".join(f"M{one.x - 4:.0f} {one.y - 4:.0f}l8 8m0-8l-8 8" for one in self.marks(series))

    def dots(self, series: Series) -> str:
        """Return a path of dots at a series' points, without texts of their own."""
        return "".join(f"M{one.x:.0f} {one.y:.0f}h0" for one in self.marks(series))
