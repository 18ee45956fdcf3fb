"""With thinking on, thoughts are separated from answers; on a model with handwritten weights that thinks."""

from __future__ import annotations

from pathlib import Path

import pytest

from job.directions.response_prefix import with_response_prefix
from job.generation.answer import Answer
from job.model.loading import LoadedModel
from job.scoring.prompt_batches import PromptBatches
from job.scoring.thinking import ThinkingModel, measure_thinking
from job.text.refusal_markers import RefusalMarkers
from tests.integration.directions.test_response_prefix import BAD, GOOD, SWITCH, WORDS, write_model

MARKERS = RefusalMarkers(["sorry"])


def tokens(text: str) -> Answer:
    return Answer([WORDS.index(word) for word in text.split()])


def batches(loaded: LoadedModel) -> PromptBatches:
    return PromptBatches.of(with_response_prefix(loaded, GOOD, BAD, 8), GOOD, BAD, 8)


def test_a_thought_is_told_from_what_follows_it(tmp_path: Path) -> None:
    model = ThinkingModel.of(write_model(tmp_path, thinks=True, template="<|answer|>" + SWITCH))
    assert model is not None
    assert model.begin == ""
    thought = model.split(tokens("<think> Hmm let me </think> Well Bread"))
    assert (thought.tokens, thought.answer, thought.unfinished) == (5, "Well Bread", False)
    endless = model.split(tokens("<think> Hmm let me see"))
    assert (endless.tokens, endless.answer, endless.unfinished) == (5, "", True)
    silent = model.split(tokens("<think> Hmm </think>"))
    assert (silent.tokens, silent.answer, silent.unfinished) == (3, "", False)
    plain = model.split(tokens("Well Bread"))
    assert (plain.tokens, plain.answer) == (None, "Well Bread")


def test_endless_thoughts_are_counted_as_empty_answers(tmp_path: Path) -> None:
    asked = batches(write_model(tmp_path, thinks=True, template="<|answer|>" + SWITCH))
    assert asked.loaded.rendering.options == (("enable_thinking", False),)  # as for all other figures
    found = measure_thinking(asked, MARKERS, 12)
    assert found is not None
    assert (found.limit, found.responses, found.thoughts, found.unfinished) == (12, 2, 2, 2)
    assert (found.median, found.ninetieth) == (12, 12)
    assert [(one.prompts, one.broken, one.empty) for one in found.outcomes] == [("bad", 1, 1), ("good", 1, 1)]


@pytest.mark.parametrize(
    ("template", "knows"),
    [
        ("<|answer|>", False),
        ("<|answer|> <think>", True),  # the template itself begins every thought
        ("<|answer|>{% if thinking %} <think>{% endif %}", True),  # off by default
    ],
)
def test_what_a_template_knows_of_thinking(template: str, knows: bool, tmp_path: Path) -> None:
    loaded = write_model(tmp_path, thinks=False, template=template)
    model = ThinkingModel.of(loaded)
    assert (model is not None) == knows
    if model is None:
        assert measure_thinking(batches(loaded), MARKERS, 12) is None
    else:
        assert model.begin == "<think>"
        assert model.split(tokens("Hmm </think> Well Sorry")).answer == "Well Sorry"
        assert model.split(tokens("Hmm let me see")).unfinished
