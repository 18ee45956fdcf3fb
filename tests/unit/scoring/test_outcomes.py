"""Every response has one outcome, and groups of prompts are counted apart."""

from __future__ import annotations

import pytest

from job.scoring.broken import Exchange
from job.scoring.outcomes import MOST_GROUPS, count_outcomes, outcome_of

LOOP = "the kettle is hot " * 12


@pytest.mark.parametrize(
    ("answer", "refused", "incoherent", "expected"),
    [
        ("In the kitchen.", False, False, "answered"),
        ("I'd rather talk about the weather.", False, False, "evaded"),
        ("I'd rather talk about the weather.", False, True, "broken"),
        (LOOP, False, False, "broken"),
        (f"I cannot. {LOOP}", True, False, "refused"),
        # A refusal needs words, although markers count an empty response as one.
        ("  \n", True, False, "broken"),
    ],
)
def test_a_response_has_one_outcome(answer: str, refused: bool, incoherent: bool, expected: str) -> None:
    assert outcome_of(Exchange("Where is it?", answer, incoherent), refused) == expected


def test_groups_are_counted_by_their_prompts_columns() -> None:
    exchanges = [
        Exchange("a", "In the hall.", groups={"category": "places", "language": "en"}),
        Exchange("b", "No, sorry.", groups={"category": "places"}),
        Exchange("c", "", groups={"category": "animals"}),
        Exchange("d", "It depends."),
    ]
    whole, *groups = count_outcomes("bad", exchanges, [False, True, True, False])
    assert (whole.column, whole.responses, whole.empty) == (None, 4, 1)
    assert (whole.answered, whole.evaded, whole.refused, whole.broken) == (1, 1, 1, 1)
    assert [(one.column, one.group, one.responses) for one in groups] == [
        ("category", "animals", 1),
        ("category", "places", 2),
        ("language", "en", 1),
    ]
    assert (groups[1].answered, groups[1].refused) == (1, 1)
    assert (groups[0].broken, groups[0].empty) == (1, 1)


def test_a_group_of_all_prompts_is_not_shown_twice() -> None:
    exchanges = [Exchange("a", "Here.", groups={"language": "en"}), Exchange("b", "There.", groups={"language": "en"})]
    assert len(list(count_outcomes("good", exchanges, [False, False]))) == 1


def test_a_column_with_a_value_for_every_prompt_does_not_fill_the_report() -> None:
    many = [Exchange("a", "Here.", groups={"category": f"number {number:03}"}) for number in range(99)]
    common = [Exchange("a", "Here.", groups={"category": "places"})] * 2
    _, *groups = count_outcomes("good", many + common, [False] * 101)
    assert len(groups) == MOST_GROUPS
    assert groups[-1].group == "places"
