"""The choice among finalists by upper confidence bounds, and why it fell."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from job.search.bounds import Finalist, choose_finalist, may_win, why_chosen

KLS = st.lists(st.floats(0, 5), min_size=1, max_size=6)


@st.composite
def finalists(draw: st.DrawFn) -> list[Finalist]:
    prompts = draw(st.integers(1, 200))
    found = []
    for number in range(draw(st.integers(1, 8))):
        refusals = draw(st.integers(0, prompts))
        broken = draw(st.integers(0, prompts - refusals))
        found.append(Finalist(number, refusals, broken, prompts, draw(KLS)))
    return found


def one(number: int, refusals: int, kl: float, *, prompts: int = 100, broken: int = 0) -> Finalist:
    return Finalist(number, refusals, broken, prompts, [kl] * 4)


def test_bounds_lie_above_the_figures_and_close_in_with_more_prompts() -> None:
    few, many = one(0, 2, 0.1), one(1, 20, 0.1, prompts=1000)
    assert 0.02 < many.faults_bound < few.faults_bound
    assert one(0, 0, 0.1).faults_bound == pytest.approx(1 / 101)  # z² / (n + z²) at z = 1
    assert few.kl_bound == few.mean_kl  # every prompt has the same
    spread = Finalist(0, 0, 0, 10, [0.0, 0.0, 0.3])
    assert (spread.mean_kl, spread.kl_bound) == (pytest.approx(0.1), pytest.approx(0.2))
    assert Finalist(0, 0, 0, 10, [0.3]).kl_bound == 0.3
    # Broken responses count like refusals.
    assert one(0, 1, 0.1, broken=2).faults_bound == one(1, 3, 0.1).faults_bound


def test_an_edit_whose_change_is_certain_wins_over_one_that_only_looks_gentler() -> None:
    lucky = Finalist(1, 0, 0, 100, [0.001] * 9 + [0.4])
    sure = Finalist(2, 0, 0, 100, [0.05] * 10)
    assert lucky.mean_kl < sure.mean_kl
    assert choose_finalist([lucky, sure], 0.02) == sure


def test_the_tolerance_trades_refusals_for_change() -> None:
    strong, gentle = one(31, 0, 0.037), one(50, 1, 0.009)
    assert choose_finalist([strong, gentle], 0.02) == gentle
    assert choose_finalist([strong, gentle], 0.0) == strong
    assert choose_finalist([strong, one(50, 9, 0.009)], 0.02) == strong


@given(finalists(), st.floats(0, 0.2))
def test_no_finalist_is_better_in_both_bounds(found: list[Finalist], tolerance: float) -> None:
    chosen = choose_finalist(found, tolerance)
    assert chosen == choose_finalist(found[::-1], tolerance)
    for other in found:
        assert other.kl_bound >= chosen.kl_bound or other.faults_bound > chosen.faults_bound
    assert chosen.faults_bound <= min(other.faults_bound for other in found) + tolerance


@pytest.mark.parametrize(
    ("found", "number", "words"),
    [
        (
            [one(31, 0, 0.037), one(50, 2, 0.009)],
            50,
            "2/100 refused, KL 0.009; trial 31 has 0/100 at KL 0.037, four times the change",
        ),
        (
            [one(31, 0, 0.037, broken=1), one(50, 2, 0.036)],
            50,
            "2/100 refused, KL 0.036; trial 31 has 0/100 refused and 1 broken at KL 0.037",
        ),
        ([one(31, 0, 0.5), one(50, 2, 0.0)], 50, "2/100 refused, KL 0; trial 31 has 0/100 at KL 0.5"),
        (
            [one(31, 0, 9.0), one(50, 1, 0.1)],
            50,
            "1/100 refused, KL 0.1; trial 31 has 0/100 at KL 9, 90 times the change",
        ),
        (
            [one(31, 0, 0.037), one(50, 9, 0.009), one(60, 30, 0.001)],
            31,
            "0/100 refused, KL 0.037; trial 50 has KL 0.009 but 9/100",
        ),
        ([one(31, 0, 0.03), one(50, 3, 0.04)], 31, "0/100 refused, KL 0.03"),
    ],
)
def test_the_reason_names_the_closest_rival(found: list[Finalist], number: int, words: str) -> None:
    chosen = next(each for each in found if each.number == number)
    assert why_chosen(found, chosen) == words
    assert why_chosen(found, chosen, "trial 7 was none") == (words if ";" in words else f"{words}; trial 7 was none")


def test_only_counts_that_chance_may_have_made_worse_come_into_question() -> None:
    assert may_win([(10, 100)], [(0, 100)], 0.02)
    assert not may_win([(12, 100)], [(0, 100)], 0.02)
    assert may_win([(12, 100)], [(0, 100)], 0.1)
    assert may_win([(3, 10)], [(0, 10)], 0.0)
    assert not may_win([(94, 100)], [(0, 100)], 0.02)


def test_counts_beyond_the_prompts_are_all_or_none() -> None:
    assert may_win([(-5, 100)], [(0, 100)], 0.0)
    assert not may_win([(10**9, 100)], [(0, 100)], 0.5)
    assert choose_finalist([one(0, 10**6, 0.1), one(1, 3, 0.1)], 0.02).number == 1


@given(st.integers(1, 200), st.data(), st.floats(0, 0.2))
def test_whoever_may_win_does_so_with_fewer_and_against_more(prompts: int, data: st.DataObject, tol: float) -> None:
    fewest, count, more = sorted(data.draw(st.lists(st.integers(0, prompts), min_size=3, max_size=3)))
    assert may_win([(fewest, prompts)], [(fewest, prompts)], tol)
    if may_win([(more, prompts)], [(fewest, prompts)], tol):
        assert may_win([(count, prompts)], [(fewest, prompts)], tol)
        assert may_win([(more, prompts)], [(count, prompts)], tol)
