"""Proof that the model on disk is the one that was measured: it is loaded afresh and compared."""

from __future__ import annotations

from collections.abc import Sequence

from job.decoding import Answer
from job.errors import ExportMismatchError
from job.evaluation import Evaluator
from job.intervention import Intervention
from job.records import EditParameters

# In float32 the greedy answers must be the same, but where two tokens are this close in logits either
# may come first: hooks and edited weights agree to 5e-6 (DESIGN section 2), summed in another order.
TIE = 1e-3
# In lower precision weights are rounded after the edit and outputs are not, so answers may part ways;
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


def prove_export(
    base: Evaluator, reloaded: Evaluator, intervention: Intervention, edit: EditParameters, rows: int
) -> str:
    """Compare the reloaded export with the base model under the edit's hooks.

    Args:
        base: Evaluator of the base model.
        reloaded: Evaluator of the reloaded export on the same prompts.
        intervention: The hooks on the base model, in place.
        edit: The edit that was exported.
        rows: Rows of a forward.

    Returns:
        What was found, in one line.

    Raises:
        ExportMismatchError: The two differ by more than rounding explains.
    """
    if base.dtype == "float32":
        intervention.activate([edit])
        hooked, answers = base.answers(intervention), reloaded.answers(None)
        ties = compare_answers(hooked, answers)
        return f"{len(answers)} answers equal the measured ones ({ties} of them up to a tie)"
    measured = base.scores(intervention, [edit], rows)[0]
    figures = reloaded.figures(base)
    assert figures.kl is not None
    apart = abs(figures.kl - measured.kl)
    refusals = abs(figures.refusals - measured.refusals)
    if not apart <= KL_BOUND + KL_SHARE * measured.kl or refusals > max(1, REFUSAL_SHARE * figures.bad_prompts):
        raise ExportMismatchError(
            f"the exported model has KL {figures.kl:.3g} and {figures.refusals} refusals "
            f"where {measured.kl:.3g} and {measured.refusals} were measured",
            remedy="report this as a bug; the export is kept for inspection",
        )
    return f"KL {figures.kl:.3g} and {figures.refusals} refusals, measured {measured.kl:.3g} and {measured.refusals}"
