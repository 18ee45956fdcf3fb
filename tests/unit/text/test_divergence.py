"""KL divergence in words, and the bound that it states."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from job.text.divergence import kl_in_words, kl_scale, kl_with_bound, moved_share

WEIGHTS = st.lists(st.floats(1e-6, 1.0), min_size=2, max_size=6)


@given(WEIGHTS, WEIGHTS)
def test_no_more_of_the_probability_moves_than_the_bound_says(first: list[float], second: list[float]) -> None:
    size = min(len(first), len(second))
    p, q = ([value / sum(given[:size]) for value in given[:size]] for given in (first, second))
    kl = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    moved = sum(abs(a - b) for a, b in zip(p, q, strict=True)) / 2
    assert moved <= moved_share(kl) + 1e-7


@pytest.mark.parametrize(
    ("kl", "words"),
    [
        (0.0, "practically the same"),
        (0.0009, "practically the same"),
        (0.001, "slightly changed"),
        (0.05, "moderately changed"),
        (0.1, "strongly changed"),
        (7.0, "severely changed"),
        (math.inf, "severely changed"),
    ],
)
def test_steps_have_one_name(kl: float, words: str) -> None:
    assert kl_in_words(kl) == words
    assert kl_with_bound(kl).startswith(f"{words}: at most ")
    assert words in [row[1] for row in kl_scale()]


def test_the_scale_is_told_with_its_bounds() -> None:
    assert kl_scale()[1:] == [
        ("under 0.001", "practically the same", "at most 2.2 %"),
        ("0.001 to 0.01", "slightly changed", "at most 7.1 %"),
        ("0.01 to 0.1", "moderately changed", "at most 22 %"),
        ("0.1 to 1", "strongly changed", "at most 71 %"),
        ("1 and more", "severely changed", "up to all"),
    ]
