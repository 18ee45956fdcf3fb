"""The search: an Optuna study that survives being killed at any instant.

Trials are asked K at a time on an in-memory copy of the study, with a sampler seeded from the job's
seed and the trial's number. The K parameter sets are written to study.db as one attribute, the plan,
before anything is evaluated, and the results are added as finished trials in number order. A restart
evaluates the unfinished plan first; so the trials of an interrupted search are those of an
uninterrupted one (docs/decisions/0003-planned-trials.md). Nothing here needs torch.
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
from optuna.trial import FrozenTrial, TrialState, create_trial

from job.records import Plan, Trial, TrialScores
from job.search.space import Space
from job.search.study import (
    DIRECTIONS,
    PLAN,
    STUDY_NAME,
    add_trials,
    as_trial,
    clear_errors,
    clear_write_errors,
    file_url,
    open_study,
)
from job.search.tpe import Sampler
from job.storage.study_file import BACKUP, back_up
from job.system.failpoints import reached

_OPENING_SCALE = 5.0


@dataclass(frozen=True)
class StudySettings:
    """How a study is to be run.

    Attributes:
        seed: The job's seed.
        startup_trials: Trials at the start that the sampler has no say in.
        batch: Trials asked and evaluated together (K).
        rows: Rows of a forward, recorded with each plan.
        together: Trials that share their forwards, likewise; None: all of a batch.
        ei_candidates: Candidates the sampler weighs for each trial.
        known_points: Whether the space's known points come first, however many; other start-up trials are random.
        ahead: Batches that are asked before the results of the one before them are known.
    """

    seed: int
    startup_trials: int
    batch: int
    rows: int
    ei_candidates: int
    together: int | None = None
    known_points: bool = True
    ahead: int = 0


@dataclass(frozen=True)
class FewerRows:
    """Memory did not suffice for a plan: it is stored and evaluated again with fewer rows a forward.

    Attributes:
        rows: Rows of a forward.
    """

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
        """Open the study, creating it if it is not there.

        Args:
            file: The study.
            space: The space of edits.
            settings: How it is run.
            copy: Where the study is copied to after every batch; None: beside it, for when it gets damaged.

        Raises:
            JobError: The file is not a study that can be read.
        """
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._file = file
        self._copy = copy or file.with_name(BACKUP)
        self._space = space
        self._settings = settings
        with clear_errors(file):
            self._study = open_study(file_url(file), STUDY_NAME)
        self._trials = self._study.get_trials(deepcopy=False)
        self._memory: optuna.Study | None = None
        self._seen = 0

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
        """Evaluate plans until the study has as many trials as the target, or may not go on.

        Args:
            target: Number of trials at the end.
            evaluate: Scores all trials of the first of some plans, and may begin with the others; or says that they
                need fewer rows. May raise at any time without harm.
            told: Called with each trial once it is stored.
            shielded: Within its block, no stop interrupts the study's writes.
            batch: Entered for every batch, from its plan to its last trial.
            may_go_on: Asked before every batch.

        Raises:
            MachineError: The study cannot be written.
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
        plans = self._with_next(unfinished, target)
        if len(plans) > len(unfinished):
            with shielded():
                self._store(plans)
        while isinstance(scores := evaluate(plans), FewerRows):
            plans = [plan.model_copy(update={"rows": scores.rows}) for plan in plans]
            self._settings = replace(self._settings, rows=scores.rows)
            with shielded():
                self._store(plans)
        done = len(self._trials)
        with shielded():
            self._tell(plans[0], scores)
            back_up(self._file, self._copy, len(self._trials))
        for trial in self._trials[done:]:
            told(as_trial(trial))

    def _store(self, plans: Sequence[Plan]) -> None:
        self._study.set_user_attr(PLAN, [plan.model_dump(mode="json") for plan in plans])
        reached("study:planned")

    def finished(self) -> list[Trial]:
        """Return all finished trials in number order."""
        return [as_trial(trial) for trial in self._trials]

    def _unfinished_plans(self) -> list[Plan]:
        stored = self._study.user_attrs.get(PLAN, [])
        # A former version knew one plan at a time.
        plans = [Plan.model_validate(one) for one in (stored if isinstance(stored, list) else [stored])]
        return [plan for plan in plans if plan.first + len(plan.parameters) > len(self._trials)]

    def _with_next(self, plans: Sequence[Plan], target: int) -> list[Plan]:
        """Return unfinished plans and those that are asked now."""
        found = list(plans)
        while len(found) <= self._settings.ahead:
            first = found[-1].first + len(found[-1].parameters) if found else len(self._trials)
            if first >= target:
                break
            found.append(self._next_plan(found, first, target))
        return found

    def _next_plan(self, unfinished: Sequence[Plan], first: int, target: int) -> Plan:
        memory = self._remembered(unfinished, first)
        # An extended search falls back into step with the batches of an unextended one.
        size = min(self._settings.batch - first % self._settings.batch, target - first)
        distributions = self._space.distributions()
        known = self._space.known_points() if self._settings.known_points else []
        parameters = []
        for number in range(first, first + size):
            if number < len(known):
                memory.enqueue_trial(known[number])
            memory.sampler = self._sampler(number)
            parameters.append(memory.ask(distributions).params)
        return Plan(first=first, parameters=parameters, rows=self._settings.rows, together=self._settings.together)

    def _remembered(self, unfinished: Sequence[Plan], first: int) -> optuna.Study:
        """Return the study in memory that a trial is asked on: all before it, as the sampler is to see them then.

        It sees the results of batches that are so many before the trial's as are asked ahead, whatever else is
        known, and of others what they try: so what is asked depends on nothing but those, however a search was
        interrupted or extended.
        """
        if self._memory is None:
            self._memory, self._seen = optuna.create_study(directions=DIRECTIONS), 0
        memory, size = self._memory, self._settings.batch
        visible = max(0, first // size - self._settings.ahead) * size
        tried = {trial.number: trial.params for trial in self._trials}
        tried |= {plan.first + index: params for plan in unfinished for index, params in enumerate(plan.parameters)}
        for number in range(len(memory.get_trials(deepcopy=False)), first):
            memory.enqueue_trial(tried[number])
            memory.sampler = self._sampler(number)
            memory.ask(self._space.distributions())
        for trial in self._trials[self._seen : visible]:
            memory.tell(trial.number, self._sampled(trial))
        self._seen = max(self._seen, visible)
        return memory

    def _sampled(self, trial: FrozenTrial) -> list[float]:
        """Return a trial's values as the sampler is to see them: the opening tells equal counts of refusals apart.

        While every trial refuses everything, the count alone would leave KL as the only measure, and the
        sampler would walk to the edit that does nothing. The odds are squeezed into ±0.5, less than one
        refusal.
        """
        scores = as_trial(trial).values
        share = 0.5 if scores.reason is not None else math.atan(scores.opening / _OPENING_SCALE) / math.pi
        return [scores.unanswered + share, scores.kl]

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

    def _tell(self, plan: Plan, scores: Sequence[TrialScores]) -> None:
        """Add all trials of a plan that are not there yet, in number order and at once."""
        distributions = self._space.distributions()
        trials = []
        for offset in range(len(self._trials) - plan.first, len(plan.parameters)):
            trial = create_trial(
                state=TrialState.COMPLETE,
                values=[float(scores[offset].refusals), scores[offset].kl],
                params=plan.parameters[offset],
                distributions=distributions,
                user_attrs=_attributes(scores[offset]),
            )
            trial.number = plan.first + offset
            trials.append(trial)
        add_trials(self._study, trials)
        self._trials += trials


def _attributes(scores: TrialScores) -> dict[str, Any]:
    # What a former version did not know is left out where it says nothing.
    more = {name for name in ("broken", "skipped") if getattr(scores, name)}
    return scores.model_dump(include={"opening", "reason"} | more)
