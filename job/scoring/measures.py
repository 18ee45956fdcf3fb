"""Measures of change as objectives of the search: cross-entropy on plain text, and errors at benchmarks.

They are taken while an edit is active, read no responses and count nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from job.config.schema import Settings
from job.config.scorers import CROSS_ENTROPY, TASKS
from job.data.prompts import Prompt
from job.errors import ImpossibleJobError
from job.model.loading import LoadedModel
from job.records import ObjectiveScore
from job.scoring.lm_eval import Harness, Scores
from job.scoring.perplexity import Passage, cross_entropies, passages_of

# Nats per token of an edit that cannot be measured; far above any usable edit's.
FAILED_CROSS_ENTROPY = 100.0
# The first of these that a task has is its accuracy.
_ACCURACIES = ("acc_norm", "acc", "exact_match")


@dataclass(frozen=True)
class EditMeasures:
    """Measures of a model beside its responses; none by default."""

    loaded: LoadedModel
    passages: tuple[Passage, ...]
    harness: Harness | None
    rows: int
    report: Callable[[str], None]

    @classmethod
    def of(
        cls, loaded: LoadedModel, settings: Settings, texts: Sequence[Prompt], rows: int, report: Callable[[str], None]
    ) -> EditMeasures:
        """Return the measures that a search's objectives name. Raises JobError."""
        names, scoring = settings.search.objectives, settings.scoring
        passages: list[Passage] = []
        if CROSS_ENTROPY in names:
            passages = [one for one in passages_of(loaded, [text.user for text in texts]) if one.count > 0]
            if not passages:
                raise ImpossibleJobError("text_prompts has no text of two tokens", remedy="give other text_prompts")
        folder = Path(scoring.tasks_folder) if scoring.tasks_folder is not None else None
        harness = Harness(scoring.tasks, scoring.tasks_limit, folder) if TASKS in names else None
        return cls(loaded, tuple(passages), harness, rows, report)

    def scores(self) -> dict[str, ObjectiveScore]:
        """Measure the model as it is now, e.g. under an edit's hooks. Raises JobError."""
        found: dict[str, float] = {}
        if self.passages:
            losses = cross_entropies(self.loaded, self.passages, self.rows, self.report)
            mean = sum(losses) / sum(passage.count for passage in self.passages)
            found[CROSS_ENTROPY] = min(mean, FAILED_CROSS_ENTROPY) if math.isfinite(mean) else FAILED_CROSS_ENTROPY
        if self.harness is not None:
            found[TASKS] = 1 - mean_accuracy(self.harness.scores(self.loaded))
        return {name: ObjectiveScore(figure=value) for name, value in found.items()}

    def failed(self) -> dict[str, ObjectiveScore]:
        """Return the scores of an edit that was rejected before it was measured."""
        found = {CROSS_ENTROPY: FAILED_CROSS_ENTROPY} if self.passages else {}
        if self.harness is not None:
            found[TASKS] = 1.0
        return {name: ObjectiveScore(figure=value) for name, value in found.items()}


def mean_accuracy(scores: Scores) -> float:
    """Return the mean of all tasks' accuracies, from 0 to 1. Raises ImpossibleJobError if a task has none."""
    tasks = list(dict.fromkeys(task for task, _ in scores))
    accuracies: list[float] = []
    for task in tasks:
        known = [scores[task, metric].value for metric in _ACCURACIES if (task, metric) in scores]
        if not known:
            raise ImpossibleJobError(
                f"task {task} has none of the metrics {', '.join(_ACCURACIES)}", remedy="choose other scoring.tasks"
            )
        accuracies.append(min(max(known[0], 0.0), 1.0))
    if not accuracies:
        raise ImpossibleJobError("scoring.tasks gave no scores", remedy="choose other scoring.tasks")
    return sum(accuracies) / len(accuracies)
