"""Sources of targets on a trained organism, and the command that runs the tool with one of them."""

from __future__ import annotations

import math
import subprocess

import pytest

from benchmarks import targets as module
from benchmarks.gradient import SHIPPED, command_of
from benchmarks.targets import SOURCES, Targets
from job.edits.hooks import ActiveEdits, Intervention
from job.gradient.targets import OPENING_TOKENS, TARGET_TOKENS, TargetMaker
from job.organism.world import expected_answer
from tests.helpers import COMMAND
from tests.integration.gradient.test_targets import PROMPTS, ablation, made

__all__ = ["made"]


@pytest.fixture
def given(
    made: tuple[TargetMaker, Intervention], monkeypatch: pytest.MonkeyPatch
) -> tuple[TargetMaker, ActiveEdits, dict[str, Targets]]:
    """Return what makes targets, a complete ablation, and the targets of all sources."""
    maker, hooks = made
    monkeypatch.setattr(module, "_earlier", [])
    edits = hooks.activate([ablation(1.0, maker.batches.loaded.architecture.layer_count)])
    return maker, edits, {name: source(maker, edits) for name, source in SOURCES.items()}


def test_sources_differ_in_who_speaks(given: tuple[TargetMaker, ActiveEdits, dict[str, Targets]]) -> None:
    maker, edits, found = given
    loaded, prompts = maker.batches.loaded, maker.batches.bad.prompts
    assert found["none"] == [None] * PROMPTS
    said = [one.tokens for one in maker.batches.responses(maker.batches.bad.tokens, TARGET_TOKENS, 32, edits)]
    own = [(target, response) for target, response in zip(found["by the edit"], said, strict=True) if target]
    assert len(own) > PROMPTS / 2
    for target, response in own:
        assert target == response
        assert not maker.markers.for_prompt("").is_refusal(loaded.decode(target))
    continued = [(target, said[index]) for index, target in enumerate(found["without mask"]) if target]
    assert continued
    assert all(target[:OPENING_TOKENS] == response[:OPENING_TOKENS] for target, response in continued)
    for prompt, target in zip(prompts, found["right answers"], strict=True):
        assert target
        assert expected_answer(prompt.user).startswith(loaded.decode(target))


def test_the_likeliest_candidate_of_all_stages_is_taken(
    given: tuple[TargetMaker, ActiveEdits, dict[str, Targets]],
) -> None:
    maker, edits, found = given
    prompts, candidates = maker.batches.bad.tokens, [found["shipped"], found["by the edit"]]
    scores = [maker.coherence.mean_log_probabilities(prompts, [one or [] for one in each]) for each in candidates]
    chosen = found["likeliest"]
    assert sum(target is not None for target in chosen) >= max(
        sum(target is not None for target in each) for each in candidates
    )
    for index, target in enumerate(chosen):
        offered = [(score[index], each[index]) for score, each in zip(scores, candidates, strict=True) if each[index]]
        scored = [(score, one) for score, one in offered if not math.isnan(score)]
        assert target in ([max(scored)[1]] if scored else [one for _, one in offered] or [None])
    assert len(module._earlier) == 2
    SOURCES["likeliest"](maker, edits)
    assert len(module._earlier) == 4


def test_the_tool_runs_with_a_source() -> None:
    assert command_of(SHIPPED) == COMMAND
    help_text = subprocess.run([*command_of("none"), "--version"], capture_output=True, text=True, check=True).stdout
    assert "abliterat" in help_text
