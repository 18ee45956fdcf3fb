"""The search: an Optuna study that survives a kill at any instant.

K trials at a time are sampled on an in-memory copy of the study, with a sampler seeded by the job's seed and the
trial's number. Their parameters are stored in study.db as one attribute, the plan, before evaluation. Results are added
as finished trials in number order. A restart evaluates the unfinished plan first, so an interrupted search has the same
trials as an uninterrupted one (docs/decisions/0003-planned-trials.md). Needs no torch.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import TrialState, create_trial

from job.records import DEFAULT_OBJECTIVES, REFUSALS, Plan, Trial, TrialScores
from job.search.pareto import pareto_front
from job.search.space import Space
from job.search.study import (
    PLAN,
    STUDY_NAME,
    add_trials,
    as_trial,
    clear_errors,
    clear_write_errors,
    directions,
    file_url,
    open_study,
)
from job.search.tpe import Sampler
from job.storage.study_file import BACKUP, back_up
from job.system.failpoints import reached

_OPENING_SCALE = 5.0


@dataclass(frozen=True)
class StudySettings:
    """Settings of a study.

    Attributes:
        startup_trials: Trials before TPE takes over.
        rows: Rows per forward, recorded with each plan.
        together: Trials that share a forward, recorded with each plan; None for the whole batch.
        known_points: Whether the space's known points come first; other start-up trials are random.
        ahead: Batches sampled before the results of the preceding one.
        racing: Whether plans say what their trials race with.
        objectives: Names of what is minimised.
    """

    seed: int
    startup_trials: int
    batch: int
    rows: int
    ei_candidates: int
    together: int | None = None
    known_points: bool = True
    ahead: int = 0
    racing: bool = False
    objectives: tuple[str, ...] = DEFAULT_OBJECTIVES


@dataclass(frozen=True)
class FewerRows:
    """Result of a plan that ran out of memory: store and evaluate it again with `rows` rows per forward."""

    rows: int


class Search:
    """A study on disk."""

    def __init__(
        self,
        file: Path,
        space: Space,
        settings: StudySettings,
        copy: Path | None = None,
    ) -> None:
        """Open or create the study, copied to `copy` after every batch. Raises JobError if it is unreadable."""
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._file = file
        self._copy = copy or file.with_name(BACKUP)
        self._space = space
        self._settings = settings
        with clear_errors(file):
            self._study = open_study(file_url(file), STUDY_NAME, settings.objectives)
        self._trials = self._study.get_trials(deepcopy=False)
        self._memory: optuna.Study | None = None
        self._seen = 0
        self._front: list[Trial] = []

    def run(
        self,
        target: int,
        evaluate: Callable[[Sequence[Plan]], Sequence[TrialScores] | FewerRows],
        *,
        told: Callable[[Trial], None],
        shielded: Callable[[], AbstractContextManager[None]] = nullcontext,
        batch: Callable[[], AbstractContextManager[None]] = nullcontext,
        may_go_on: Callable[[], bool] = lambda: True,
    ) -> None:
        """Evaluate plans until the study has `target` trials or `may_go_on` is false. Raises MachineError.

        Args:
            target: Number of trials at the end.
            evaluate: Scores the first plan and may start the others; or returns `FewerRows`. May raise at any time.
            told: Called with each stored trial.
            shielded: Context that defers stops during the study's writes.
            batch: Context of every batch, from plan to last trial.
            may_go_on: Checked before every batch.
        """
        while len(self._trials) < target and may_go_on():
            with batch(), clear_write_errors(self._file):
                self._run_batch(target, evaluate, shielded, told)

    def _run_batch(
        self,
        target: int,
        evaluate: Callable[[Sequence[Plan]], Sequence[TrialScores] | FewerRows],
        shielded: Callable[[], AbstractContextManager[None]],
        told: Callable[[Trial], None],
    ) -> None:
        unfinished = self._unfinished_plans()
        plans = self._with_new_plans(unfinished, target)
        if len(plans) > len(unfinished):
            with shielded():
                self._store(plans)
        while isinstance(scores := evaluate(plans), FewerRows):
            plans = [plan.model_copy(update={"rows": scores.rows}) for plan in plans]
            self._settings = replace(self._settings, rows=scores.rows)
            with shielded():
                self._store(plans)
        finished = len(self._trials)
        with shielded():
            self._add_results(plans[0], scores)
            back_up(self._file, self._copy, len(self._trials))
        for trial in self._trials[finished:]:
            told(as_trial(trial))

    def _store(self, plans: Sequence[Plan]) -> None:
        self._study.set_user_attr(PLAN, [plan.model_dump(mode="json") for plan in plans])
        reached("study:planned")

    def finished(self) -> list[Trial]:
        """Return the study's evaluated trials in number order, rejected ones included."""
        return [as_trial(trial) for trial in self._trials]

    def _unfinished_plans(self) -> list[Plan]:
        stored = self._study.user_attrs.get(PLAN, [])
        # A former version stored a single plan.
        plans = [Plan.model_validate(plan) for plan in (stored if isinstance(stored, list) else [stored])]
        return [plan for plan in plans if plan.first + len(plan.parameters) > len(self._trials)]

    def _with_new_plans(self, plans: Sequence[Plan], target: int) -> list[Plan]:
        plans_ahead = list(plans)
        while len(plans_ahead) <= self._settings.ahead:
            first = plans_ahead[-1].first + len(plans_ahead[-1].parameters) if plans_ahead else len(self._trials)
            if first >= target:
                break
            plans_ahead.append(self._next_plan(plans_ahead, first, target))
        return plans_ahead

    def _next_plan(self, unfinished: Sequence[Plan], first: int, target: int) -> Plan:
        memory = self._sampling_study(unfinished, first)
        # An extended search realigns with the batches of an unextended one.
        size = min(self._settings.batch - first % self._settings.batch, target - first)
        distributions = self._space.distributions()
        known_points = self._space.known_points() if self._settings.known_points else []
        parameters = []
        for number in range(first, first + size):
            if number < len(known_points):
                memory.enqueue_trial(known_points[number])
            memory.sampler = self._sampler(number)
            parameters.append(memory.ask(distributions).params)
        rivals = [(one.values.unanswered, one.values.kl) for one in self._front] if self._settings.racing else []
        return Plan(
            first=first,
            parameters=parameters,
            rows=self._settings.rows,
            together=self._settings.together,
            rivals=tuple(rivals),
        )

    def _sampling_study(self, unfinished: Sequence[Plan], first: int) -> optuna.Study:
        """Return the in-memory study that a trial is sampled on: all earlier trials, as the sampler may see them.

        Results are visible up to `ahead` batches before the trial's; of later trials only their parameters. So sampling
        is deterministic, however the search was interrupted or extended.
        """
        if self._memory is None:
            self._memory, self._seen = optuna.create_study(directions=directions(self._settings.objectives)), 0
            self._front = []
        memory, size = self._memory, self._settings.batch
        visible = max(0, first // size - self._settings.ahead) * size
        tried = {trial.number: trial.params for trial in self._trials}
        tried |= {plan.first + index: params for plan in unfinished for index, params in enumerate(plan.parameters)}
        for number in range(len(memory.get_trials(deepcopy=False)), first):
            memory.enqueue_trial(tried[number])
            memory.sampler = self._sampler(number)
            memory.ask(self._space.distributions())
        known = [as_trial(trial) for trial in self._trials[self._seen : visible]]
        for trial in known:
            memory.tell(trial.number, self._sampled(trial.values))
        self._front = pareto_front([*self._front, *known])
        self._seen = max(self._seen, visible)
        return memory

    def _sampled(self, scores: TrialScores) -> list[float]:
        """Return the values for the sampler: smooth parts break ties between equal counts.

        While every trial refuses everything, KL would be the only objective and the sampler would converge to no edit.
        For refusals the part is the opening's log-odds, squashed to ±0.5, less than one refusal.
        """
        share = 0.5 if scores.reason is not None else math.atan(scores.opening / _OPENING_SCALE) / math.pi
        smooth = {REFUSALS: share} | {name: other.smooth for name, other in scores.others.items()}
        return [scores.cost(name) + smooth.get(name, 0.0) for name in scores.objectives]

    def _sampler(self, number: int) -> optuna.samplers.BaseSampler:
        digest = hashlib.sha256(f"{self._settings.seed}:{number}".encode()).digest()
        return Sampler(
            self._space.distributions(),
            n_startup_trials=self._settings.startup_trials,
            n_ei_candidates=self._settings.ei_candidates,
            multivariate=True,
            constant_liar=True,
            seed=int.from_bytes(digest[:4], "big"),
        )

    def _add_results(self, plan: Plan, scores: Sequence[TrialScores]) -> None:
        distributions = self._space.distributions()
        trials = []
        for offset in range(len(self._trials) - plan.first, len(plan.parameters)):
            trial = create_trial(
                state=TrialState.COMPLETE,
                values=_stored(scores[offset]),
                params=plan.parameters[offset],
                distributions=distributions,
                user_attrs=_attributes(scores[offset]),
            )
            trial.number = plan.first + offset
            trials.append(trial)
        add_trials(self._study, trials)
        self._trials += trials


def _stored(scores: TrialScores) -> list[float]:
    """Return a trial's values in the database: without broken responses, which have an attribute."""
    return [float(scores.refusals) if name == REFUSALS else scores.cost(name) for name in scores.objectives]


def _attributes(scores: TrialScores) -> dict[str, Any]:
    # Values unknown to a former version are omitted where empty.
    more = {name for name in ("broken", "skipped", "projected_from") if getattr(scores, name)}
    if scores.objectives != DEFAULT_OBJECTIVES:
        more |= {"refusals", "kl", "objectives", "others"}
    return scores.model_dump(include={"opening", "reason"} | more)
