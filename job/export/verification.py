"""Proof that the model on disk is the one that was measured: it is loaded afresh and compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from job.edits.hooks import Intervention
from job.errors import ExportMismatchError
from job.generation.answer import Answer
from job.records import EditParameters, TrialScores
from job.scoring.trial_scorer import Evaluator

# In float32 the greedy answers must be the same, but where two tokens are this close in logits either
# may come first: hooks and edited weights agree to 2e-5 in logits (docs/decisions/0002-edits-are-hooks.md).
TIE = 1e-3
# In lower precision and in 4 bits weights are rounded after the edit and outputs are not, so answers may part ways;
# the measures must agree within these bounds.
KL_BOUND, KL_SHARE = 0.05, 0.25
REFUSAL_SHARE = 0.05


def compare_answers(hooked: Sequence[Answer], reloaded: Sequence[Answer]) -> int:
    """Return how many answers part ways at a tie; all others are the same.

    Raises:
        ExportMismatchError: Answers part ways where there is no tie.
    """
    ties = 0
    for index, (one, other) in enumerate(zip(hooked, reloaded, strict=True)):
        if one.tokens == other.tokens:
            continue
        pairs = zip(one.tokens, other.tokens, strict=False)
        step = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one.tokens), len(other.tokens)))
        margin = min(one.margins[step], other.margins[step])
        if margin > TIE:
            raise ExportMismatchError(
                f"the exported model answers prompt {index} otherwise from token {step} on, "
                f"where the best token led by {margin:.2g} logits",
                remedy="report this as a bug; the export is kept for inspection",
            )
        ties += 1
    return ties


@dataclass(frozen=True)
class MeasuredEdit:
    """What a reloaded export is compared with: the base model under the edit's hooks.

    Attributes:
        answers: Its answers, where they must be the same.
        scores: Its scores, where only these must agree.
    """

    answers: Sequence[Answer] = ()
    scores: TrialScores | None = None

    @classmethod
    def of(cls, base: Evaluator, intervention: Intervention, edit: EditParameters, rows: int, exact: bool) -> Self:
        """Measure what exports of the edit will be compared with; afterwards the base model is not needed for that.

        Args:
            base: Evaluator of the base model.
            intervention: The hooks on it, in place.
            edit: The edit that is exported.
            rows: Rows of a forward.
            exact: Exports are held as precisely as they are computed.
        """
        if not (exact and base.exact):
            return cls(scores=base.scores(intervention, [edit], rows)[0])
        return cls(answers=base.answers(intervention.activate([edit])))

    def compare(self, reloaded: Evaluator, base: Evaluator) -> str:
        """Compare the reloaded export with it; return what was found, in one line.

        Args:
            reloaded: Evaluator of the export on the same prompts.
            base: Evaluator that has measured the base model.

        Raises:
            ExportMismatchError: The two differ by more than rounding explains.
        """
        if self.scores is None:
            answers = reloaded.answers(None)
            ties = compare_answers(self.answers, answers)
            return f"{len(answers)} answers equal the measured ones ({ties} of them up to a tie)"
        figures = reloaded.figures(base)
        assert figures.kl is not None
        apart = abs(figures.kl - self.scores.kl)
        refusals = abs(figures.refusals - self.scores.refusals)
        if not apart <= KL_BOUND + KL_SHARE * self.scores.kl or refusals > max(1, REFUSAL_SHARE * figures.bad_prompts):
            raise ExportMismatchError(
                f"the exported model has KL {figures.kl:.3g} and {figures.refusals} refusals "
                f"where {self.scores.kl:.3g} and {self.scores.refusals} were measured",
                remedy="report this as a bug; the export is kept for inspection",
            )
        return (
            f"KL {figures.kl:.3g} and {figures.refusals} refusals, "
            f"measured {self.scores.kl:.3g} and {self.scores.refusals}"
        )
