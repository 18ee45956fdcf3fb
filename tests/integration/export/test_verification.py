"""The proof that an export is the measured edit, prompt by prompt."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from job.edits.hooks import Intervention
from job.errors import ExportMismatchError
from job.export.verification import KL_BOUND, require_rounding
from job.records import EditParameters
from job.scoring.kl import KLReference
from tests.integration.edits.test_hooks import EDITS, basis_for, trial_scorer


@pytest.mark.parametrize("kl_tokens", [1, 3])
def test_another_edit_is_told_from_the_measured_one(random_model_folder: Path, kl_tokens: int) -> None:
    batches = trial_scorer(random_model_folder).batches
    model = batches.loaded.model
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(30)  # so that edits change what is said
    reference = KLReference.measured(batches, kl_tokens)
    with Intervention(model, batches.loaded.architecture, basis_for(model), "none") as hooks:
        hooked = reference.under(batches, hooks.activate([EDITS[0]]))

        def distances(edit: EditParameters) -> tuple[list[float], list[float]]:
            to_hooked, to_base = (one.divergences(batches, hooks.activate([edit])) for one in (hooked, reference))
            return to_hooked, to_base

        same, of_edit = distances(EDITS[0])
        assert max(same) < 1e-6 < KL_BOUND < max(of_edit)
        require_rounding(same, of_edit)
        with pytest.raises(ExportMismatchError, match=r"edit on [23] of 4 good prompts: KL .* at prompt 2"):
            require_rounding(*distances(EDITS[2]))


def test_a_few_prompts_may_be_decided_by_rounding() -> None:
    edit = [0.01] * 100
    require_rounding([KL_BOUND] * 100, edit)
    require_rounding([*[2.0] * 5, *[0.0] * 95], edit)
    require_rounding([9.0], [0.01])
    with pytest.raises(ExportMismatchError, match="on 6 of 100 good prompts: KL 3 at prompt 2"):
        require_rounding([2.0, 2.0, 3.0, 2.0, 2.0, 2.0, *[0.0] * 94], edit)
