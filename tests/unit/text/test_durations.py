"""Durations and rates as text."""

from __future__ import annotations

import pytest

from job.text.durations import duration_text, elapsed_text, rate_text


@pytest.mark.parametrize(
    ("seconds", "duration", "elapsed"),
    [
        (0.04, "0.0 s", "0:00"),
        (9.96, "10.0 s", "0:09"),
        (59.9, "59 s", "0:59"),
        (125, "2 min 5 s", "2:05"),
        (3725, "1 h 2 min", "1:02:05"),
        (200000, "2 d 7 h", "55:33:20"),
    ],
)
def test_times_have_one_form(seconds: float, duration: str, elapsed: str) -> None:
    assert (duration_text(seconds), elapsed_text(seconds)) == (duration, elapsed)


@pytest.mark.parametrize(
    ("steps", "seconds", "text"),
    [
        (10, 31, "3.1 s each"),
        (1, 90, "1 min 30 s each"),
        (24, 2, "12 a second"),
        (99_970, 100, "1000 a second"),
        (203_000, 100, "2030 a second"),
        (3e9, 30, "100 million a second"),
    ],
)
def test_slow_steps_are_told_by_their_time_and_fast_ones_by_their_rate(steps: float, seconds: float, text: str) -> None:
    assert rate_text(steps, seconds) == text
