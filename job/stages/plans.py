"""Evaluation of the search's plans in this process and in workers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

from job.lifecycle.running import OpenJob
from job.model.device_faults import Shortage, within_memory
from job.records import Plan, TrialScores
from job.scoring.objectives import Objectives
from job.scoring.race import Race
from job.scoring.trial_scorer import TrialOutcome
from job.search.optimizer import FewerRows
from job.stages.evaluation import TrialsTask
from job.stages.session import ModelSession
from job.workers.executor import Executor


@dataclass(frozen=True)
class PlanEvaluator:
    """Scores plans in this process and in workers."""

    job: OpenJob
    session: ModelSession
    executor: Executor
    objectives: Objectives

    def scores(self, plans: Sequence[Plan]) -> Sequence[TrialScores] | FewerRows:
        """Return the first plan's scores, or fewer rows; workers may start the other plans. Raises MachineError."""
        rounds = [self._tasks(plan) for plan in plans]
        ahead = [task for tasks in rounds[1:] for task in tasks]
        found = within_memory(partial(self.executor.evaluate, rounds[0], self._score_here, ahead))
        if not isinstance(found, Shortage):
            return self.objectives.scored([outcome for part in found for outcome in part])
        rows = plans[0].rows // 2
        if rows < max(len(task.edits) for tasks in rounds for task in tasks):
            raise found.error()
        pin_fewer_rows(self.job, "search_rows", rows)
        return FewerRows(rows)

    def _tasks(self, plan: Plan) -> list[TrialsTask]:
        edits = [self.session.space.edit(params) for params in plan.parameters]
        size = plan.together or len(edits)
        parts = [tuple(edits[start : start + size]) for start in range(0, len(edits), size)]
        race = Race(self.job.resolution.racing or 0, plan.rivals) if plan.rivals else None
        return [TrialsTask(part, plan.rows, plan.whole, self.objectives.keep, race) for part in parts]

    def _score_here(self, task: TrialsTask) -> list[TrialOutcome]:
        return self.session.scorer.outcomes(task.edits, task.rows, task.whole, task.keep, task.race)


def pin_fewer_rows(job: OpenJob, field: Literal["search_rows", "choice_rows"], rows: int) -> None:
    """Record the rows per forward with which the search, or the measuring of finalists, continues."""
    what = "the search" if field == "search_rows" else "measuring finalists"
    message = f"warning: out of memory: {what} continues with {rows} rows per forward pass"
    job.events.emit("out_of_memory", message, rows=rows)
    job.file.pin(resolution=job.resolution.model_copy(update={field: rows}))
