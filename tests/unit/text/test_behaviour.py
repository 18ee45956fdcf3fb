"""How output speaks of a behaviour that people name in their own words."""

from __future__ import annotations

import pytest

from job.config.behaviours import BEHAVIOURS
from job.config.load import load_settings
from job.text.behaviour import HARMLESS, REFUSAL_WORDS, words_in, words_of


@pytest.mark.parametrize("name", BEHAVIOURS)
def test_a_preset_speaks_of_refusals_only_where_it_removes_them(name: str) -> None:
    words = words_in(load_settings({"model": "m", "behaviour": name}).settings.model_dump())
    assert words.refuses == (name in ("refusal", "over-refusal"))
    assert words.refuses or "refus" not in repr(words).casefold()


def test_a_short_name_is_used_as_it_is() -> None:
    words = words_of("flattery")
    assert f"5 of 20 {words.shown}" == "5 of 20 with flattery"
    assert f"the base model {words.shows} 5 of 20 prompts" == "the base model shows flattery on 5 of 20 prompts"


@pytest.mark.parametrize(
    "name", ["a long account of what it is that the model does too often", "<b>x</b>", "a | b", "*x*"]
)
def test_descriptions_and_markup_stay_out_of_tables(name: str) -> None:
    words = words_of(name)
    assert name not in repr(words)
    assert words.shown == "with the behaviour"


def test_settings_of_former_versions_are_about_refusals() -> None:
    assert words_in({}) is REFUSAL_WORDS


def test_harmless_behaviours_are_those_of_presets_that_are_no_refusals() -> None:
    named = {load_settings({"model": "m", "behaviour": name}).settings.card.behaviour for name in BEHAVIOURS}
    assert {name for name in named if not words_of(name).refuses} == HARMLESS
