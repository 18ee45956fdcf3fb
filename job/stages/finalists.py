"""Finalists of a search: scored on full-length responses, measured again for the choice, resumably."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from job.lifecycle.running import OpenJob
from job.model.device_faults import Shortage, within_memory
from job.records import FinalistScores, Plan, Trial
from job.search.choice import Choice, keep_finalists
from job.search.finalists import in_words, keep_full_counts, read_full_counts, with_full_counts
from job.search.optimizer import FewerRows
from job.stages.choice import choice_of, uncounted
from job.stages.evaluation import FinalistsTask
from job.stages.measuring import FinalistOutcome
from job.stages.plans import PlanEvaluator, pin_fewer_rows
from job.stages.session import ModelSession
from job.system.failpoints import reached
from job.workers.executor import Executor


@dataclass(frozen=True)
class FinalistEvaluator:
    """Scores the finalists of a search until the choice is final, in this process and in workers."""

    job: OpenJob
    session: ModelSession
    executor: Executor
    plans: PlanEvaluator

    def settled(self, trials: Sequence[Trial]) -> list[Trial]:
        """Return all trials, finalists with full-length counts, once the choice is final. Raises MachineError."""
        trials = self._counted(trials, choice_of(self.job, self.session.prompts))
        self._measure(trials, choice_of(self.job, self.session.prompts))
        return trials

    def _counted(self, trials: Sequence[Trial], choice: Choice) -> list[Trial]:
        job, prompts = self.job, len(self.session.prompts.bad_search)
        counts = read_full_counts(job.folder)
        while batch := uncounted(job, trials, choice, counts):
            plan = Plan(
                first=batch[0].number,
                parameters=[trial.params for trial in batch],
                rows=self._rows,
                together=self._together(len(batch)),
                whole=True,
            )
            with job.events.progress("trials at full length", len(batch)):
                scores = self.plans.scores([plan])
            if isinstance(scores, FewerRows):
                continue  # the smaller batch size is pinned, and the next plan has it
            counts = keep_full_counts(job.folder, counts, batch, scores)
            for trial, after in zip(batch, scores, strict=True):
                before = trial.values
                words = f"{in_words(after, job.words, prompts)}; in the search {in_words(before, job.words)}"
                job.events.emit(
                    "rescored",
                    f"trial {trial.number} at full length: {words}",
                    number=trial.number,
                    refusals=after.refusals,
                    broken=after.broken,
                    **after.model_dump(mode="json", include={"others"}),
                )
        return with_full_counts(trials, counts)

    def _measure(self, trials: Sequence[Trial], choice: Choice) -> None:
        """Measure finalists on the prompts held out for the choice, all in one round, and their KL per prompt."""
        job = self.job
        while left := choice.unmeasured(trials):
            with job.events.progress("finalists measured for the choice", len(left)):
                scores = self._scores(left)
            if scores is None:
                continue
            reached("finalists:measured")
            choice = choice.with_measured({t.number: found for t, found in zip(left, scores, strict=True)})
            keep_finalists(job.folder, choice)
            for trial in left:
                pooled, figures = choice.pooled(trial), choice.figures(trial.number)
                apart = f"; {figures.refusals}/{figures.bad_prompts} of these held out" if figures else ""
                job.events.emit(
                    "finalist",
                    f"finalist {trial.number}: {pooled}{apart}; KL {pooled.mean_kl:.4g}, at most "
                    f"{pooled.kl_bound:.4g} by its bound",
                    number=trial.number,
                    **(figures.model_dump() if figures else {}),
                )

    def _scores(self, trials: Sequence[Trial]) -> list[FinalistScores] | None:
        """Return the trials' scores; None after memory ran out: a smaller batch size is pinned."""
        rows = self.job.resolution.choice_rows or self._rows
        size = min(self._together(len(trials)), rows)
        edits = [self.session.space.edit(trial.params) for trial in trials]
        parts = [tuple(edits[start : start + size]) for start in range(0, len(edits), size)]
        tasks = [FinalistsTask(part, rows, self.plans.objectives.keep) for part in parts]
        found = within_memory(partial(self.executor.evaluate, tasks, self._here))
        if isinstance(found, Shortage):
            if rows == 1:
                raise found.error()
            pin_fewer_rows(self.job, "choice_rows", rows // 2)
            return None
        return self._with_others([outcome for part in found for outcome in part])

    def _with_others(self, outcomes: Sequence[FinalistOutcome]) -> list[FinalistScores]:
        """Add the figures in objectives beyond refusals and KL."""
        prompts = self.session.prompts
        held_out = (len(prompts.bad_choice), len(prompts.good_choice))
        others = self.plans.objectives.others([outcome.heard for outcome in outcomes], held_out)
        return [
            outcome.scores.model_copy(update={"others": own}) for outcome, own in zip(outcomes, others, strict=True)
        ]

    def _here(self, task: FinalistsTask) -> list[FinalistOutcome]:
        return self.session.finalists.outcomes(task.edits, task.rows, task.keep)

    @property
    def _rows(self) -> int:
        return self.job.resolution.search_rows or self.job.resolution.rows

    def _together(self, count: int) -> int:
        """Return how many edits share a forward: as in the search at most, and all workers have some."""
        size, together = self.job.record.trials_per_batch, self.job.resolution.together
        parts = -(-size // (together or size))
        return min(-(-count // parts), together or size)
