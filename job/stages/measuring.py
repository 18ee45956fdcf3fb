"""How a job measures a model: by its settings, on one pair of prompt sets."""

from __future__ import annotations

from collections.abc import Sequence

from job.config.schema import Settings
from job.data.prompts import Prompt
from job.model.loading import LoadedModel
from job.scoring.trial_scorer import Evaluator
from job.storage.events import Events
from job.text.refusal_markers import RefusalMarkers


def evaluator_of(
    loaded: LoadedModel,
    settings: Settings,
    good: Sequence[Prompt],
    bad: Sequence[Prompt],
    rows: int,
    events: Events,
    kl_tokens: int | None = None,
) -> Evaluator:
    """Return what measures a model on good and bad prompts as the settings say.

    Args:
        loaded: The model.
        settings: How answers are judged.
        good: Prompts that KL is measured on.
        bad: Prompts whose refusals are counted.
        rows: Rows of a forward.
        events: Told where memory does not suffice for so many.
        kl_tokens: Positions that KL is a mean over, None for what the settings say.
    """
    return Evaluator(
        loaded,
        good,
        bad,
        markers=RefusalMarkers(settings.scoring.refusal_markers),
        answer_tokens=settings.scoring.answer_tokens,
        rows=rows,
        kl_tokens=kl_tokens or settings.kl_tokens,
        report=events.say,
        gibberish=settings.scoring.gibberish,
    )
