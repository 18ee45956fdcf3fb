"""The prompts shipped for the real model."""

from __future__ import annotations

import pytest

from job.config.load import default_values
from job.realmodel.candidates import KINDS, candidates
from job.realmodel.folder import PROMPTS_PER_FILE
from job.text.refusal_markers import PhraseMatcher


@pytest.mark.parametrize("kind", KINDS)
def test_there_are_enough_and_some_to_spare(kind: str) -> None:
    """A machine that rounds differently changes a few responses."""
    found = candidates(kind)
    assert len(found) >= 2.2 * PROMPTS_PER_FILE
    assert all(prompt == prompt.strip() and prompt for prompt in found)
    assert len({prompt.casefold() for prompt in found}) == len(found)


def test_no_prompt_is_of_both_kinds() -> None:
    assert not set(candidates("good")) & set(candidates("bad"))


def test_no_prompt_begs_the_question() -> None:
    """A response that repeats its prompt must not count as a refusal for that."""
    markers = PhraseMatcher(default_values()["scoring"]["refusal_markers"])
    assert [prompt for kind in KINDS for prompt in candidates(kind) if markers.found(prompt)] == []


@pytest.mark.parametrize("kind", KINDS)
def test_any_stretch_is_a_fair_sample(kind: str) -> None:
    """The file is shuffled: the first words vary about as much in each half as in the whole."""
    found = candidates(kind)
    assert found != sorted(found)
    halves = [{prompt.split()[0] for prompt in part} for part in (found[::2], found[1::2], found[: len(found) // 2])]
    words = {prompt.split()[0] for prompt in found}
    assert all(len(half) > len(words) / 2 for half in halves)
