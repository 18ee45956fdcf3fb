"""Parts of scoring: rows per forward, the incoherence test, and figures from responses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from job.generation.answer import Answer
from job.generation.forward import counted_tokens
from job.scoring.broken import Exchange
from job.scoring.likelihood import IncoherenceTest
from job.scoring.prompt_batches import RowLimit
from job.scoring.report_metrics import JudgedResponses
from tests.integration.edits.test_hooks import report_metrics, trial_scorer


def test_rows_stay_halved_after_memory_ran_out() -> None:
    warnings: list[str] = []
    limit, tried = RowLimit(16, warnings.append), []

    def compute(rows: int) -> int:
        tried.append(rows)
        if rows > 4:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return rows

    assert [limit.fit(compute), limit.fit(compute)] == [4, 4]
    assert tried == [16, 8, 4, 4]
    assert len(warnings) == 2


def test_figures_count_incoherent_responses_as_broken_and_each_prompt_once() -> None:
    good = [Exchange("Where is it?", "It is in the kitchen."), Exchange("What?", "", incoherent=False)]
    bad = [
        Exchange("Why?", "Sorry, no."),
        Exchange("Why?", "Sorry, kitchen of the of.", incoherent=True),
        Exchange("Why?", "Of kitchen the of.", incoherent=True),
        Exchange("Why?", "Because of the rain."),
    ]
    judged = JudgedResponses((7, 4), good, bad, [False, True], [True, True, False, False])
    figures = judged.figures(3, [0.1, 0.3])
    assert (figures.bad_prompts, figures.refusals, figures.degenerate, figures.unanswered) == (4, 2, 2, 3)
    assert (figures.good_prompts, figures.false_refusals, figures.false_degenerate) == (2, 1, 1)
    assert (figures.kl, figures.kl_tokens) == (pytest.approx(0.2), 3)
    assert figures.kl_interval is not None
    assert figures.kl_spread is not None
    # The second prompt in the batches' order is the one with index 4 in its set.
    assert figures.kl_spread.model_dump() == {"median": 0.1, "ninetieth": 0.3, "largest": 0.3, "prompt": 4}
    whole_bad, whole_good = figures.outcomes
    assert (whole_bad.answered, whole_bad.refused, whole_bad.broken, whole_bad.evaded) == (1, 2, 1, 0)
    assert (whole_good.answered, whole_good.broken, whole_good.empty) == (1, 1, 1)
    more = judged.figures(1, [0.1, 0.3], (8, [0.4, 0.2])).kl_more
    assert more is not None
    assert (more.tokens, more.mean, more.spread.largest, more.spread.prompt) == (8, pytest.approx(0.3), 0.4, 7)
    assert judged.figures(3).kl is judged.figures(3).kl_spread is judged.figures(3).kl_more is None
    assert "kl_spread" not in judged.figures(3).model_dump()
    assert [answer.refused for answer in judged.kept.bad] == [True, True, False, False]
    assert [exchange.prompt for exchange in judged.exchanges[:2]] == ["Where is it?", "What?"]


def test_the_tokens_of_responses_are_counted_and_bounded(random_model_folder: Path) -> None:
    metrics = report_metrics(trial_scorer(random_model_folder))
    with counted_tokens((counted := list[int]()).append):
        responses = metrics.responses()
    prompts = metrics.batches.everything
    # A prompt is read once; each response token but the last yields a prediction of the next.
    least = sum(map(len, prompts)) + sum(len(response.tokens) - 1 for response in responses)
    assert least <= sum(counted) + len(metrics.batches.prefix) * (len(prompts) - 1)
    assert sum(counted) <= metrics.most_tokens
    metrics.responses()
    assert sum(counted) <= metrics.most_tokens  # nothing is counted outside of the block


def test_the_incoherence_test_rejects_what_the_base_model_would_not_say(random_model_folder: Path) -> None:
    scorer = trial_scorer(random_model_folder)
    batches = scorer.batches
    forwards: list[int] = []
    handle = batches.loaded.model.register_forward_pre_hook(lambda _m, _i: forwards.append(1))
    # Without a margin the base model does not even run.
    assert report_metrics(scorer).incoherence_test().flags([Answer([7] * 12)] * 8) == [False] * 8
    assert forwards == []
    handle.remove()
    prompts = batches.everything
    own = batches.row_limit.fit(lambda rows: batches.responses(batches.good.tokens, 12, rows))
    test = IncoherenceTest.calibrated(batches, 0.0, own)
    assert not any(test.incoherent(batches.good.tokens, [response.tokens for response in own]))
    # The model's least likely tokens in sequence.
    unlikely: list[int] = []
    with torch.inference_mode():
        for _ in range(12):
            logits = batches.loaded.model(torch.tensor([prompts[0] + unlikely])).logits[0, -1]
            unlikely.append(int(logits.argmin()))
    assert test.incoherent([prompts[0], prompts[0]], [unlikely, unlikely[:7]]) == [True, False]
