"""Proof that an export is the model that was measured: it is reloaded and compared."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from job.edits.hooks import Intervention
from job.errors import ExportMismatchError
from job.generation.answer import Answer
from job.model.loading import LoadedModel
from job.records import EditParameters, TrialScores
from job.scoring.kl import KLReference
from job.scoring.report_metrics import ReportMetrics
from job.scoring.trial_scorer import TrialScorer

# In float32 the greedy responses must be the same, except that either of two tokens this close in logits may come
# first: hooks and edited weights agree to 2e-5 (docs/decisions/0002-edits-are-hooks.md).
TIE = 1e-3
# In lower precision and in 4 bits, edited weights are rounded and edited outputs are not, so responses may differ;
# KL and refusals must agree within these bounds.
KL_BOUND, KL_SHARE = 0.05, 0.25
REFUSAL_SHARE = 0.05
# Rounding keeps each prompt's logits within KL_BOUND of the hooked model's, too (at most 0.0003 nats were measured,
# docs/lab-notes/gradient.md). A few prompts may differ by more: where two experts are nearly tied, rounding decides.
OUTLIER_SHARE = 0.05


def compare_answers(hooked: Sequence[Answer], reloaded: Sequence[Answer]) -> int:
    """Count responses that diverge at a tie. Raises ExportMismatchError if one diverges elsewhere."""
    ties = 0
    for index, (one, other) in enumerate(zip(hooked, reloaded, strict=True)):
        if one.tokens == other.tokens:
            continue
        pairs = zip(one.tokens, other.tokens, strict=False)
        step = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one.tokens), len(other.tokens)))
        margin = min(one.margins[step], other.margins[step])
        if margin > TIE:
            raise ExportMismatchError(
                f"the exported model answers prompt {index} differently from token {step} on, "
                f"where the best token led by {margin:.2g} logits",
                remedy="report this as a bug; the export is kept for inspection",
            )
        ties += 1
    return ties


def is_exact(loaded: LoadedModel) -> bool:
    """Return whether editing outputs equals editing weights, both being float32."""
    return loaded.dtype == "float32" and not getattr(loaded.model, "is_quantized", False)


@dataclass(frozen=True)
class MeasuredScores:
    """What a reloaded export must match.

    Attributes:
        scores: Scores of the edit under hooks.
        reference: The base model's KL reference.
        hooked: The same positions read under the edit's hooks, from which the export's logits may differ by rounding.
    """

    scores: TrialScores
    reference: KLReference
    hooked: KLReference


@dataclass(frozen=True)
class MeasuredEdit:
    """Results of the base model under an edit's hooks: responses to match exactly, or scores to agree with."""

    expected: Sequence[Answer] | MeasuredScores

    @classmethod
    def by_responses(cls, base: ReportMetrics, intervention: Intervention, edit: EditParameters) -> Self:
        """Generate the responses that an exact export must match; hooks must be in place."""
        return cls(base.responses(intervention.activate([edit])))

    @classmethod
    def by_scores(cls, base: TrialScorer, intervention: Intervention, edit: EditParameters) -> Self:
        """Measure the scores that an export with rounded weights must match; hooks must be in place."""
        markers = base.by_markers  # rounding may make more responses evasive, or fewer, than it may refuse
        scores = base.batches.row_limit.fit(lambda rows: markers.scores(intervention, [edit], rows)[0])
        hooked = base.reference.under(base.batches, intervention.activate([edit]))
        return cls(MeasuredScores(scores, base.reference, hooked))

    def compare(self, reloaded: ReportMetrics) -> str:
        """Compare the reloaded export; return the result in one line. Raises ExportMismatchError beyond rounding."""
        responses = reloaded.responses()
        if not isinstance(self.expected, MeasuredScores):
            ties = compare_answers(self.expected, responses)
            return f"{len(responses)} of {len(self.expected)} responses match ({ties} with ties)"
        refusals = sum(reloaded.judge(responses).bad_refused)
        divergences = self.expected.reference.divergences(reloaded.batches)
        kl = math.fsum(divergences) / len(divergences)
        agreement = _agreement(self.expected.scores, kl, refusals, len(reloaded.batches.bad))
        rounding = self.expected.hooked.divergences(reloaded.batches)
        if not getattr(reloaded.batches.loaded.model, "is_quantized", False):  # 4 bits round each prompt differently
            require_rounding(rounding, divergences)
        return f"{agreement}; at most {max(rounding):.2g} nats from the measured edit on any prompt"


def require_rounding(rounding: Sequence[float], divergences: Sequence[float]) -> None:
    """Raise ExportMismatchError if prompts differ from the measured edit by more than rounding explains.

    `rounding` is the export's KL from the measured edit, `divergences` from the base model, in nats per good prompt.
    """
    beyond = [index for index, kl in enumerate(divergences) if rounding[index] > KL_BOUND + KL_SHARE * kl]
    if len(beyond) > max(1, OUTLIER_SHARE * len(rounding)):
        worst = max(beyond, key=rounding.__getitem__)
        raise ExportMismatchError(
            f"the exported model is not the measured edit on {len(beyond)} of {len(rounding)} good prompts: "
            f"KL {rounding[worst]:.3g} at prompt {worst}",
            remedy="report this as a bug; the export is kept for inspection",
        )


def _agreement(measured: TrialScores, kl: float, refusals: int, bad_prompts: int) -> str:
    """Compare scores. Raises ExportMismatchError if they differ by more than rounding explains."""
    kl_agrees = abs(kl - measured.kl) <= KL_BOUND + KL_SHARE * measured.kl
    if not kl_agrees or abs(refusals - measured.refusals) > max(1, REFUSAL_SHARE * bad_prompts):
        raise ExportMismatchError(
            f"the exported model has KL {kl:.3g} and {refusals} responses with the behaviour "
            f"instead of the measured {measured.kl:.3g} and {measured.refusals}",
            remedy="report this as a bug; the export is kept for inspection",
        )
    return (
        f"KL {kl:.3g} and {refusals} responses with the behaviour, measured {measured.kl:.3g} and {measured.refusals}"
    )
