"""Warnings about flat fronts, searches that have not converged, and edits without effect or with damage."""

from __future__ import annotations

import pytest

from job.records import Figures, Trial, TrialScores
from job.search.convergence import effect_warnings, hypervolume, search_warnings


def trials(*measured: tuple[int, float] | None) -> list[Trial]:
    values = [
        TrialScores(refusals=100, kl=100.0, reason="planted")
        if one is None
        else TrialScores(refusals=one[0] // 2, broken=one[0] - one[0] // 2, kl=one[1])
        for one in measured
    ]
    return [Trial(number=number, params={}, values=found) for number, found in enumerate(values)]


def test_the_hypervolume_is_the_area_that_a_front_dominates() -> None:
    assert hypervolume([]) == hypervolume([(1.0, 0.0), (0.0, 3.0)]) == 0
    assert hypervolume([(0.0, 0.0)]) == 1
    # Refusals 0.2 to 1 above KL 0.4, and 0.5 to 1 from KL 0.1 to 0.4; a dominated point adds nothing.
    assert hypervolume([(0.2, 0.4), (0.5, 0.1), (0.6, 0.3)]) == pytest.approx(0.8 * 0.6 + 0.5 * 0.3)


CONVERGED = [(90, 0.0), (10, 0.1), (0, 0.2), (50, 0.05), None, (12, 0.1), (40, 0.3), (30, 0.3), (0, 0.199)]


@pytest.mark.parametrize(
    ("measured", "word"),
    [
        (CONVERGED, None),
        (CONVERGED[:5], None),
        ([None] * 9, None),
        ([*CONVERGED[:6], (0, 0.1), (0, 0.05), (0, 0.01)], "not converged: its last third added 7 %"),
        ([(100, 0.5)] * 6 + [(100, 0.5), (3, 0.1), None], "not converged: its last third added 100 %"),
        ([(2, 0.1) for number in range(9)], None),
        ([(97, 0.1 * number) for number in range(9)], "flat: every edit leaves 97 of 100"),
    ],
)
def test_a_doubtful_search_is_told(measured: list[tuple[int, float] | None], word: str | None) -> None:
    found = search_warnings(trials(*measured), 100)
    assert len(found) == (word is not None)
    assert word is None or word in found[0]


def figures(unanswered: int, broken: int) -> Figures:
    return Figures(
        bad_prompts=50, refusals=0, good_prompts=50, false_refusals=0, degenerate=broken, unanswered=unanswered
    )


def test_an_edit_without_effect_and_one_that_damages_are_told() -> None:
    before = figures(50, 0)
    assert effect_warnings(before, figures(2, 2)) == []
    (idle,) = effect_warnings(before, figures(48, 0))
    assert "50 of 50 prompts with the behaviour went unanswered before, 48 of 50 after" in idle
    assert [warning.split(":")[0] for warning in effect_warnings(before, figures(50, 40))] == [
        "the edit has no effect that differs from chance",
        "the edited model is damaged",
    ]
