"""Targets on a trained organism: opened by an edit, continued by the base model, and screened."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from job.config.load import default_values
from job.data.prompts import Prompt
from job.directions.residuals import extract_residuals
from job.edits.hooks import Intervention
from job.gradient import targets as module
from job.gradient.targets import OPENING_TOKENS, TARGET_TOKENS, TargetMaker, refusal_only
from job.model.loading import load_model
from job.numerics.basis import Basis
from job.numerics.directions import mean_difference
from job.records import COMPONENTS, EditParameters
from job.scoring.likelihood import IncoherenceTest
from job.scoring.prompt_batches import PromptBatches
from job.text.refusal_markers import RefusalMarkers
from tests.helpers import loading

PROMPTS = 24
MARKERS = default_values()["scoring"]["refusal_markers"]


@pytest.fixture(scope="module")
def made(organism: Path) -> Iterator[tuple[TargetMaker, Intervention]]:
    loaded = load_model(organism / "model", loading("float32"), lambda _: None)
    good, bad = (
        [Prompt(user=line) for line in (organism / f"{kind}_train.txt").read_text().splitlines()[:PROMPTS]]
        for kind in ("good", "bad")
    )
    residuals = [extract_residuals(loaded, loaded.tokenize(one), 32, lambda _: None)[:, 1:] for one in (good, bad)]
    basis = Basis.single(mean_difference(*residuals))
    batches = PromptBatches.of(loaded, good, bad, 32)
    markers = RefusalMarkers(MARKERS)
    own = batches.responses(batches.good.tokens, 30, 32)
    refusals = [answer.tokens for answer in batches.responses(batches.bad.tokens, 30, 32)]
    only = refusal_only(refusals, [answer.tokens for answer in own])
    coherence = IncoherenceTest.calibrated(batches, 2.0, own)
    with Intervention(loaded.model, loaded.architecture, basis, "none") as hooks:
        yield TargetMaker(batches, range(PROMPTS), only, markers, coherence, 30), hooks


def ablation(strength: float, layers: int) -> EditParameters:
    given = dict.fromkeys(COMPONENTS, ((strength,),) * layers)
    return EditParameters(direction_index=None, kernels={}, layer_strengths=given)


def test_targets_are_answers_that_an_edit_opens_and_the_base_model_finishes(
    made: tuple[TargetMaker, Intervention],
) -> None:
    maker, hooks = made
    layers = maker.batches.loaded.architecture.layer_count
    targets = maker.targets(hooks.activate([ablation(1.0, layers)]))
    assert len(targets) == PROMPTS
    usable = [(index, target) for index, target in enumerate(targets) if target is not None]
    assert len(usable) > PROMPTS / 2
    opened = maker.batches.responses(
        maker.batches.bad.tokens, OPENING_TOKENS, 32, hooks.activate([ablation(1.0, layers)])
    )
    for index, target in usable:
        assert target[:OPENING_TOKENS] == opened[index].tokens
        assert OPENING_TOKENS < len(target) <= TARGET_TOKENS
        assert not set(target[OPENING_TOKENS:]) & maker.refusal_tokens
        prompt = maker.batches.bad.prompts[maker.bad[index]].user
        assert not maker.markers.for_prompt(prompt).is_refusal(maker.batches.loaded.decode(target))
    assert targets == maker.targets(hooks.activate([ablation(1.0, layers)]))


def test_responses_that_evade_under_an_edit_are_found_and_are_no_targets(
    made: tuple[TargetMaker, Intervention], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which responses evade is planted: those that name a place."""
    maker, hooks = made
    edits = hooks.activate([ablation(1.0, maker.batches.loaded.architecture.layer_count)])
    said = maker.batches.responses(maker.batches.bad.tokens, 30, 32, edits)
    expected = [one.tokens if " kept in " in maker.batches.loaded.decode(one.tokens) else None for one in said]
    assert 0 < expected.count(None) < PROMPTS
    monkeypatch.setattr(module, "is_evasion", lambda _, text: " kept in " in text)
    assert maker.evasions(edits) == expected
    counted = replace(maker, markers=RefusalMarkers(MARKERS, evasions=True))
    for found, before in zip(counted.targets(edits), maker.targets(edits), strict=True):
        evades = before is not None and " kept in " in maker.batches.loaded.decode(before)
        assert found == (None if evades else before)


def test_what_still_refuses_is_no_target(made: tuple[TargetMaker, Intervention]) -> None:
    maker, hooks = made
    edits = hooks.activate([ablation(0.0, maker.batches.loaded.architecture.layer_count)])
    texts = [None if one is None else maker.batches.loaded.decode(one) for one in maker.targets(edits)]
    # The marker of one kind of refusal comes last, so its opening alone is no refusal.
    assert not any(text and maker.markers.for_prompt("").is_refusal(text) for text in texts)
    assert texts.count(None) >= PROMPTS / 2


def test_tokens_that_only_refusals_have() -> None:
    assert refusal_only([[1, 2], [3, 2]], [[2, 4], [5]]) == {1, 3}
