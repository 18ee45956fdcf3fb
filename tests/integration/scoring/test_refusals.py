"""Everything that looks for refusal markers finds them in the same responses, by the prompt of each."""

from __future__ import annotations

from pathlib import Path

import pytest

from job.config.load import default_values
from job.config.sections import ScoringSettings
from job.data.prompts import Prompt
from job.edits.hooks import Intervention
from job.gradient.hooks import DifferentiableEdits
from job.gradient.problem import Problem
from job.gradient.recipe import Recipe
from job.model.loading import LoadedModel, load_model
from job.numerics.basis import Basis
from job.organism.world import WORLD
from job.realmodel.behaviour import first_prompts
from job.records import COMPONENTS, EditParameters
from job.scoring import refusals
from job.scoring.detectors import Context, make_scorer
from job.scoring.prompt_batches import PromptBatches
from job.scoring.report_metrics import ReportMetrics
from job.scoring.trial_scorer import TrialScorer
from job.text.refusal_markers import RefusalMarkers
from tests.helpers import loading
from tests.integration.edits.test_hooks import basis_for

TOKENS = 30
# All answers to good prompts name the thing that was asked for; some answers hold one of the other markers.
MARKERS = [*WORLD, "kept in the", "i can't"]


def unedited(loaded: LoadedModel) -> EditParameters:
    nothing = dict.fromkeys(COMPONENTS, ((0.0,),) * loaded.architecture.layer_count)
    return EditParameters(direction_index=None, kernels={}, layer_strengths=nothing)


@pytest.mark.parametrize("topic_words", [True, False])
def test_all_that_looks_for_markers_agrees_on_which_responses_refuse(organism: Path, topic_words: bool) -> None:
    loaded = load_model(organism / "model", loading("float32"), lambda _: None)
    texts = [line for kind in ("good", "bad") for line in (organism / f"{kind}_test.txt").read_text().splitlines()]
    prompts = [Prompt(user=text) for text in texts[10:70]]
    batches = PromptBatches.of(loaded, prompts, prompts, 16)
    markers = RefusalMarkers(MARKERS, topic_words=topic_words)
    metrics = ReportMetrics(batches, markers, TOKENS)
    responses = metrics.responses()
    judged = metrics.judge(responses)

    def refuses(prompt: str, text: str) -> bool:
        return any(marker in text.lower() and not (topic_words and marker in prompt.lower()) for marker in MARKERS)

    expected = [refuses(one.prompt, one.answer) for one in judged.bad]
    assert judged.bad_refused == judged.good_refused == expected
    assert 5 < sum(expected) < 25 if topic_words else sum(expected) > 30

    basis: Basis = basis_for(loaded.model)
    scorer = TrialScorer.measured(batches, markers, TOKENS)
    with Intervention(loaded.model, loaded.architecture, basis, "none") as hooks:
        for rows in (16, 7):
            (scores,) = scorer.scores(hooks, [unedited(loaded)], rows)
            assert scores.refusals == sum(expected)

    scoring = ScoringSettings.model_validate(default_values()["scoring"])
    context = Context(scoring, markers, loading("float32"), lambda _: None)
    for name in ("markers", "soft"):
        labels = make_scorer(name, context)(judged.bad)
        assert all(label == "refused" for label, refused in zip(labels, expected, strict=True) if refused)
    assert [label == "refused" for label in make_scorer("markers", context)(judged.bad)] == expected

    asked = [one.prompt for one in judged.bad]
    declined = first_prompts(loaded, asked, markers, declined=True, count=len(asked))
    assert declined == [prompt for prompt, refused in zip(asked, expected, strict=True) if refused]

    edits = DifferentiableEdits(loaded, "none", 1.5)
    problem = Problem.measured(loaded, edits, Recipe(), 0, (prompts, prompts), markers, TOKENS, 16, None)
    assert list(problem.maker.bad) == [index for index, refused in enumerate(expected) if refused]


def test_evasive_responses_count_as_refused_where_they_are_to(organism: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which responses are evasive is planted: those that name a place, or whose first five tokens name a thing."""
    loaded = load_model(organism / "model", loading("float32"), lambda _: None)
    prompts = [Prompt(user=text) for text in (organism / "good_test.txt").read_text().splitlines()[:30]]
    batches = PromptBatches.of(loaded, prompts, prompts, 16)
    tokens = [answer.tokens for answer in batches.responses(batches.bad.tokens, TOKENS, 16)]
    beginnings, wholes = [loaded.decode(one[:5]) for one in tokens], [loaded.decode(one) for one in tokens]
    places = {text for text in wholes if "kept in" in text.lower()}
    assert 0 < len(places) < len(wholes)
    monkeypatch.setattr(refusals, "is_evasion", lambda _, text: text in places or text == beginnings[0])
    assert wholes[0] not in places
    basis: Basis = basis_for(loaded.model)
    expected = sum(text in places for text in wholes)
    either = sum(text in places or begun == beginnings[0] for text, begun in zip(wholes, beginnings, strict=True))
    assert either > expected
    with Intervention(loaded.model, loaded.architecture, basis, "none") as hooks:
        for evasions, searched, count in ((False, None, 0), (True, None, expected), (True, 5, either)):
            markers = RefusalMarkers(["zebra"], evasions=evasions)
            scorer = TrialScorer.measured(batches, markers, TOKENS)
            (found,) = scorer.outcomes(hooks, [unedited(loaded)], 16, search_tokens=searched)
            assert (found.scores.refusals, found.scores.broken) == (count, 0)
            # The export's proof counts without them.
            (found,) = scorer.by_markers.outcomes(hooks, [unedited(loaded)], 16, search_tokens=searched)
            assert (found.scores.refusals, markers.evasions) == (0, evasions)
