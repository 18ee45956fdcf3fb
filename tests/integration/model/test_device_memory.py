"""Memory that runs out while a model is loaded, its hooks are made, or an export is proven."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from job.edits.hooks import Intervention
from job.errors import MachineError
from job.export.verification import MeasuredEdit, MeasuredScores
from job.generation.forward import RowTrials, first_logits
from job.model.loading import load_model
from job.numerics.ablation import RowNormalization
from tests.helpers import loading
from tests.integration.edits.test_hooks import EDITS, basis_for, trial_scorer
from tests.shortage import Short

CUBLAS = "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"


def test_a_device_too_small_for_a_forward_is_not_a_dtype_that_does_not_work(random_model_folder: Path) -> None:
    load_model(random_model_folder, loading("float32"), pytest.fail)  # its structure is known from here on
    with (
        Short(lambda name, *_: name == "linear", CUBLAS),
        pytest.raises(MachineError, match="out of memory: CUDA error: CUBLAS_STATUS_ALLOC_FAILED"),
    ):
        load_model(random_model_folder, loading("float32", "bfloat16"), pytest.fail)


@pytest.mark.parametrize("mode", ["pre", "full", "column"])
def test_hooks_are_made_on_the_cpu_where_the_device_is_too_small(
    random_model_folder: Path, mode: RowNormalization
) -> None:
    loaded = load_model(random_model_folder, loading("float32"), pytest.fail)
    model, prompts = loaded.model, [[5, 6, 7], [8, 9]]

    def logits() -> torch.Tensor:
        with Intervention(model, loaded.architecture, basis_for(model), mode) as hooks:
            edits = hooks.activate(EDITS[:2])
            return first_logits(model, prompts, RowTrials(torch.tensor([0, 1]), edits))

    expected = logits()
    with Short(lambda name, *_: name == "norm", "CUDA error: out of memory", times=1) as short:
        found = logits()
    assert short.left == 0
    assert torch.equal(found, expected)


def test_an_export_is_proven_by_smaller_forwards(random_model_folder: Path) -> None:
    scorer = trial_scorer(random_model_folder)
    model = scorer.batches.loaded.model
    with Intervention(model, scorer.batches.loaded.architecture, basis_for(model), "none") as hooks:
        expected = MeasuredEdit.by_scores(scorer, hooks, EDITS[0]).expected
        with Short(lambda name, *_: name == "linear", CUBLAS) as short:
            found = MeasuredEdit.by_scores(scorer, hooks, EDITS[0]).expected
    assert short.left == 0
    assert isinstance(found, MeasuredScores)
    assert isinstance(expected, MeasuredScores)
    assert found.scores.refusals == expected.scores.refusals
    assert found.scores.kl == pytest.approx(expected.scores.kl, rel=1e-4)
