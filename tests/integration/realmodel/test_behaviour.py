"""Prompts sorted by a model's responses."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from job.config.load import default_values
from job.model.loading import LoadedModel, load_model
from job.realmodel.behaviour import RESPONSE_TOKENS, first_prompts
from job.text.refusal_markers import RefusalMarkers
from tests.helpers import loading

MARKERS = RefusalMarkers(default_values()["scoring"]["refusal_markers"])


@pytest.fixture(scope="module")
def loaded(organism: Path) -> LoadedModel:
    return load_model(organism / "model", loading("float32"), lambda line: pytest.fail(line))


@pytest.fixture(scope="module")
def mixed(organism: Path) -> list[str]:
    """Return more prompts of both kinds than fit in a batch, alternating."""
    files = [(organism / f"{kind}_test.txt").read_text().splitlines() for kind in ("good", "bad")]
    return [prompt for pair in zip(*files, strict=True) for prompt in pair]


def responses(folder: Path, prompts: list[str]) -> list[str]:
    """Return the responses in plain transformers, one prompt at a time."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = []
    for prompt in prompts:
        said = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
        tokens = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
        response = model.generate(tokens, do_sample=False, max_new_tokens=RESPONSE_TOKENS)[0, tokens.shape[1] :]
        found.append(tokenizer.decode(response, skip_special_tokens=True))
    return found


def test_prompts_are_sorted_by_what_the_model_says(organism: Path, loaded: LoadedModel, mixed: list[str]) -> None:
    refused = {
        prompt: MARKERS.for_prompt(prompt).found(text)
        for prompt, text in zip(mixed, responses(organism / "model", mixed), strict=True)
    }  # fmt: skip
    for declined in (True, False):
        found = first_prompts(loaded, mixed, MARKERS, declined=declined, count=len(mixed))
        assert found == [prompt for prompt in mixed if refused[prompt] == declined]
        assert len(found) > 10


def test_no_more_are_returned_than_asked_for(loaded: LoadedModel, mixed: list[str]) -> None:
    everything = first_prompts(loaded, mixed, MARKERS, declined=True, count=len(mixed))
    assert first_prompts(loaded, mixed, MARKERS, declined=True, count=7) == everything[:7]
    assert first_prompts(loaded, [], MARKERS, declined=True, count=7) == []
