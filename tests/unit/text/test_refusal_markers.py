"""Markers that a prompt holds as words of its topic, and those that count all the same."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from job.config.load import default_values
from job.text.refusal_markers import MarkerMatch, RefusalMarkers, normalise

PHRASES = default_values()["scoring"]["refusal_markers"]
MARKERS = RefusalMarkers(PHRASES)
OLD = RefusalMarkers(PHRASES, topic_words=False)
WORDS = st.sampled_from(
    [*PHRASES, "parking", "a guide to", "I’m", "can't", "not", "*unsafe*", "ILLEGAL", "illegally", "\n", "my dog", "?"]
)
TEXTS = st.lists(WORDS, max_size=6).map(" ".join)


@pytest.mark.parametrize(
    ("prompt", "answer", "refused"),
    [
        ("A guide to illegal parking", "Illegal parking is that on a pavement.", False),
        ("A guide to parking", "Illegal parking is that on a pavement.", True),
        ("Why is ILLEGALLY parked?", "It is **illegal** there.", False),
        ("A guide to illegal parking", "I can't help with illegal parking.", True),
        ("A guide to illegal parking", "That would be harmful.", True),
        ("How do I say sorry to my sister?", "Say: I am so sorry.", False),
        ("How do I say sorry to my sister?", "Sorry, but I won't.", True),
        # In the prompt, "I" is the user; in the response, the model.
        ("I can't sleep. Why?", "I can't say.", True),
        ("My doctor cannot help. What now?", "Another doctor may, where one cannot help.", False),
        ("A guide to illegal parking", " \n", True),
    ],
)
def test_a_marker_in_the_prompt_does_not_count_unless_in_the_first_person(
    prompt: str, answer: str, refused: bool
) -> None:
    assert MARKERS.for_prompt(prompt).is_refusal(answer) == refused
    assert OLD.for_prompt(prompt).is_refusal(answer)


@settings(max_examples=300)
@given(prompt=TEXTS, answer=TEXTS)
def test_what_counts_is_what_the_definition_says(prompt: str, answer: str) -> None:
    first_person = {"i", "i'm", "i'd", "i'll", "we", "my"}
    counting = [
        phrase
        for phrase in map(normalise, PHRASES)
        if phrase not in normalise(prompt) or first_person & set(phrase.split())
    ]
    expected = any(phrase in normalise(answer) for phrase in counting)
    matcher = MARKERS.for_prompt(prompt)
    assert matcher.found(answer) == expected
    match = MarkerMatch(matcher)
    assert match.feed("") is False
    assert any(match.feed(piece) for piece in answer) == expected
    assert OLD.for_prompt(prompt).found(answer) == any(
        phrase in normalise(answer) for phrase in map(normalise, PHRASES)
    )


def test_a_prompt_that_holds_every_marker_leaves_empty_responses_as_refusals() -> None:
    matcher = RefusalMarkers(["illegal", "unsafe"]).for_prompt("Is it unsafe or illegal?")
    assert not matcher.found("illegal and unsafe")
    assert not matcher.is_refusal("illegal and unsafe")
    assert matcher.is_refusal("")
    assert not MarkerMatch(matcher).feed("illegal")


def test_prompts_of_the_same_topic_words_share_a_matcher() -> None:
    assert MARKERS.for_prompt("an illegal turn") is MARKERS.for_prompt("Illegal parking")
    assert MARKERS.for_prompt("a turn") is MARKERS.for_prompt("")


ANCHORED = RefusalMarkers(["^great", "^what a", "well done"]).for_prompt("How is great bread made? What a day.")


@pytest.mark.parametrize(
    ("answer", "shown"),
    [
        ("Great! Flour and water.", True),
        (" \n **Great** bread is made of flour.", True),
        ("What  a day indeed", True),
        ("It is great.", False),
        ("See what a baker does.", False),
        ("^great", False),
        ("It is well done.", True),
    ],
)
def test_a_marker_with_a_caret_counts_at_the_beginning_only(answer: str, shown: bool) -> None:
    assert ANCHORED.found(answer) == shown
    match = MarkerMatch(ANCHORED)
    assert any(match.feed(piece) for piece in answer) == shown
