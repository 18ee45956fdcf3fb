"""Durations are numbers in a setting's unit, or text with units."""

from __future__ import annotations

from typing import Any

import pytest

from job.text.durations import Unit, duration


@pytest.mark.parametrize(
    ("text", "unit", "found"),
    [
        ("90", "m", 90.0),
        ("1.5", "h", 1.5),
        ("1h30m", "m", 90.0),
        ("30m", "h", 0.5),
        ("2 h", "s", 7200.0),
        ("1d", "h", 24.0),
        ("45sec", "s", 45.0),
        ("10min", "s", 600.0),
        (3, "h", 3),
        (None, "h", None),
    ],
)
def test_text_becomes_a_number_in_the_unit(text: Any, unit: Unit, found: Any) -> None:
    assert duration(text, unit) == found


@pytest.mark.parametrize("text", ["", "soon", "30 m or so", "m", "1y", "-", "5m5", "1,5h"])
def test_other_text_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is no duration"):
        duration(text, "s")
