"""KL divergence over several tokens, and trials that it rejects before generation."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from job.architectures.structure import discover
from job.edits.hooks import Intervention
from job.generation.greedy import greedy_answers
from job.records import EditParameters, TrialScores
from job.scoring.trial_scorer import TrialScorer
from tests.integration.edits.test_hooks import EDITS, basis_for, edit_in_place, kernel, report_metrics, trial_scorer


def scored(scorer: TrialScorer, edits: list[EditParameters], rows: int = 16, **others: float) -> list[TrialScores]:
    model = scorer.batches.loaded.model
    with Intervention(model, discover(model), basis_for(model), "full") as intervention:
        return scorer.scores(intervention, edits, rows, **others)


@torch.inference_mode()
def by_hand(folder: Path, scorer: TrialScorer, edit: EditParameters, tokens: int) -> float:
    """Compute the KL divergence prompt by prompt and token by token, on a model with edited weights."""
    base, edited = (AutoModelForCausalLM.from_pretrained(folder).eval() for _ in range(2))
    edit_in_place(edited, edit, "full", basis_for(edited))
    means = []
    for prompt in scorer.batches.good.tokens:
        (answer,) = greedy_answers(base, [prompt], limit=tokens, end_tokens=scorer.batches.loaded.end_tokens)
        steps = min(len(answer.tokens) + 1, tokens)
        values = []
        for step in range(steps):
            ids = torch.tensor([prompt + answer.tokens[:step]])
            p, q = (m(ids).logits[0, -1].double().log_softmax(-1) for m in (base, edited))
            values.append(float((p.exp() * (p - q)).sum()))
        means.append(sum(values) / len(values))
    return sum(means) / len(means)


@pytest.mark.parametrize(("tokens", "system"), [(1, None), (4, None), (4, "You are a helpful assistant.")])
def test_kl_is_the_mean_over_the_base_models_own_answers(
    random_model_folder: Path, tokens: int, system: str | None
) -> None:
    scorer = trial_scorer(random_model_folder, system=system, kl_tokens=tokens)
    # 4 rows: a chunk of one prompt where there are several tokens.
    for rows in (4, 64):
        for edit, found in zip(EDITS, scored(scorer, EDITS, rows), strict=True):
            assert found.kl == pytest.approx(by_hand(random_model_folder, scorer, edit, tokens), rel=1e-3)


def test_answers_that_end_early_are_compared_up_to_their_end(random_model_folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(random_model_folder).eval()
    scorer = trial_scorer(random_model_folder, kl_tokens=5)
    said = greedy_answers(model, scorer.batches.good.tokens, limit=5, end_tokens=())
    model.generation_config.eos_token_id = said[0].tokens[2]
    model.save_pretrained(random_model_folder.parent / "ending")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (random_model_folder.parent / "ending" / name).write_bytes((random_model_folder / name).read_bytes())
    scorer = trial_scorer(random_model_folder.parent / "ending", kl_tokens=5)
    lengths = [len(continuation) for continuation in scorer.reference.continuations]
    assert min(lengths) < 4
    assert sum(lengths) + len(lengths) == len(scorer.reference.logits)
    (found,) = scored(scorer, EDITS[:1])
    assert found.kl == pytest.approx(by_hand(random_model_folder, scorer, EDITS[0], 5), rel=1e-3)
    model = scorer.batches.loaded.model
    with Intervention(model, discover(model), basis_for(model), "full") as intervention:
        metrics, edits = report_metrics(scorer), intervention.activate(EDITS[:1])
        divergences = scorer.reference.divergences(scorer.batches, edits)
        figures = metrics.judge(metrics.responses(edits)).figures(metrics.kl_tokens, divergences)
    assert figures.kl == pytest.approx(found.kl, rel=1e-4)
    assert figures.kl_tokens == 5


def test_trials_beyond_the_limit_are_not_made_to_answer(random_model_folder: Path) -> None:
    scorer = trial_scorer(random_model_folder)
    plain = scored(scorer, EDITS)
    limit = sorted(score.kl for score in plain)[1]
    model = scorer.batches.loaded.model
    rows: list[int] = []
    handle = model.register_forward_pre_hook(
        lambda _m, _i, named: rows.append(len(named["input_ids"])), with_kwargs=True
    )
    found = scored(scorer, EDITS, skip_kl_above=limit)
    handle.remove()
    # The shared prefix; all trials for the KL divergence; two of four for the responses.
    assert rows[:3] == [4, 16, 8]
    for score, expected in zip(found, plain, strict=True):
        assert score.kl == expected.kl
        if expected.kl > limit:
            assert (score.skipped, score.refusals) == (True, 4)
            assert "no answers were generated" in str(score.reason)
        else:
            assert (score.skipped, score.reason, score.refusals) == (False, None, expected.refusals)
            assert score.opening == pytest.approx(expected.opening, rel=1e-4)
    assert sum(score.skipped for score in found) == 2
    rows.clear()
    assert all(score.skipped for score in scored(scorer, EDITS, skip_kl_above=0.0))


def test_logits_that_are_not_finite_fail_their_trial_alone(random_model_folder: Path) -> None:
    broken = EditParameters(direction_index=1.0, kernels=dict.fromkeys(("attention", "mlp"), kernel(1e300)))
    for tokens in (1, 3):
        scorer = trial_scorer(random_model_folder, kl_tokens=tokens)
        model = scorer.batches.loaded.model
        with Intervention(model, discover(model), basis_for(model), "none") as intervention:
            failed, fine = scorer.scores(intervention, [broken, EDITS[0]], 16)
        assert failed.reason == "the logits are not finite"
        assert (failed.refusals, failed.kl, failed.skipped) == (4, 100.0, False)
        assert fine.reason is None
