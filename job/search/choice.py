"""The choice of a job's trial: who is a finalist, what is left to measure, who is chosen and why. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from job.data.prompts import PromptSets
from job.errors import JobError
from job.records import ChoiceFigures, FinalistScores, JobRecord, MeasuredFinalists, Trial
from job.search.bounds import MOST_FINALISTS, Finalist, are_alike, choose_finalist, may_win, why_chosen
from job.search.finalists import FullCounts, read_full_counts
from job.search.pareto import choose, eligible, pareto_front
from job.storage.atomic import ensure_folder, read_record, write_record
from job.storage.run_folder import RunFolder
from job.text.behaviour import REFUSAL_WORDS, BehaviourWords, words_in


@dataclass(frozen=True)
class Choice:
    """A job's rule with what has been measured of its finalists.

    Attributes:
        by_bounds: Finalists are measured again and compared by confidence bounds; False: by the search's counts, as in
            former versions.
        tolerance: Share of unanswered prompts, `choice.refusal_tolerance`.
        searched: Bad and good prompts of the search.
        held_out: Bad prompts held out for the choice.
        counts: Counts of the trials scored at full length; empty where the search does so itself.
        measured: Finalists' scores by trial number.
        words: The behaviour in words.
    """

    by_bounds: bool
    tolerance: float
    searched: tuple[int, int]
    held_out: int = 0
    counts: FullCounts = field(default_factory=FullCounts)
    measured: Mapping[int, FinalistScores] = field(default_factory=dict)
    words: BehaviourWords = REFUSAL_WORDS

    def candidates(self, trials: Sequence[Trial]) -> list[Trial]:
        """Return the trials that may be chosen, on the front. Raises JobError if every trial failed."""
        if not self.by_bounds:
            return eligible(trials, self.searched[0], self.tolerance)
        front = pareto_front(self.compared(trials))
        if not front:
            raise JobError("every trial failed", remedy="see the reasons in events.jsonl")
        prompts = self.searched[0]
        # Stable: the front's own order for equal ones, with two objectives its order anyway.
        front.sort(key=lambda trial: trial.values.faults(prompts))
        fewest = front[0].values.tallies(prompts)
        return [
            trial for trial in front[:MOST_FINALISTS] if may_win(trial.values.tallies(prompts), fewest, self.tolerance)
        ]

    def compared(self, trials: Sequence[Trial]) -> Sequence[Trial]:
        """Return the trials that can be compared fairly: reading only the beginnings of responses flatters a trial.

        Once `MOST_FINALISTS` trials are scored at full length, any other that is no better than one of them by the
        beginnings of both is left out.
        """
        counted = self.counts.refusals.keys()
        if not self.by_bounds or len(counted) < MOST_FINALISTS:
            return trials
        whole = [trial for trial in trials if trial.number in counted]
        return [
            trial
            for trial in trials
            if trial.number in counted or not any(self._is_no_better(trial, other) for other in whole)
        ]

    def _is_no_better(self, trial: Trial, whole: Trial) -> bool:
        """Return whether a trial is no gentler than one scored at full length and, but for chance, as faulty.

        Both by the beginnings of their responses: faults further on, which only one of them was read for, tell nothing
        about the other.
        """
        values, read = trial.values, self.counts.beginnings.get(whole.number, whole.values)
        if any(one > other for one, other in zip(whole.values.change, values.change, strict=True)):
            return False
        prompts = self.searched[0]
        return values.faults(prompts) >= read.faults(prompts) or are_alike(
            values.tallies(prompts), read.tallies(prompts)
        )

    def unmeasured(self, trials: Sequence[Trial]) -> list[Trial]:
        """Return the finalists to measure before the choice is final, in number order. Raises JobError."""
        if not self.by_bounds:
            return []
        left = [trial for trial in self.candidates(trials) if trial.number not in self.measured]
        return sorted(left, key=lambda trial: trial.number)

    def chosen(self, trials: Sequence[Trial]) -> Trial:
        """Return the chosen trial, among measured finalists; by the search's counts without any. Raises JobError."""
        measured = self._pooled(trials) if self.by_bounds else []
        if not measured:
            return choose(self.compared(trials), self.searched[0], self.tolerance)
        number = choose_finalist(measured, self.tolerance).number
        return next(trial for trial in trials if trial.number == number)

    def reason(self, trials: Sequence[Trial]) -> str | None:
        """Return why the trial was chosen; None while that is open, or for a former version's rule."""
        if not self.by_bounds or not trials or self.unmeasured(trials):
            return None
        pooled = self._pooled(trials)
        chosen = choose_finalist(pooled, self.tolerance)
        return why_chosen(pooled, chosen, self._gentler(trials, chosen.number))

    def _gentler(self, trials: Sequence[Trial], number: int) -> str:
        """Describe the next gentler trial on the front, which was no finalist; "" if there is none."""
        front = sorted(pareto_front(self.compared(trials)), key=lambda trial: trial.values.change, reverse=True)
        after = front[[trial.number for trial in front].index(number) + 1 :]
        rest = [trial for trial in after if trial.number not in self.measured]
        if not rest:
            return ""
        values = rest[0].values
        others = "".join(f", {name} {score}" for name, score in values.others.items())
        counts = f"{values.unanswered}/{self.searched[0]}{others}"
        return f"trial {rest[0].number} has KL {values.kl:.4g} but {counts} in the search"

    def figures(self, number: int) -> ChoiceFigures | None:
        """Return a finalist's figures on the prompts held out for the choice; None if there are none."""
        scores = self.measured.get(number)
        if scores is None or not self.held_out:
            return None
        return ChoiceFigures.of(scores, self.searched, self.held_out)

    def with_measured(self, scores: Mapping[int, FinalistScores]) -> Choice:
        """Return the choice with further finalists measured."""
        return replace(self, measured={**self.measured, **scores})

    def pooled(self, trial: Trial) -> Finalist:
        """Return a measured finalist's figures over all prompts."""
        values, scores = trial.values, self.measured[trial.number]
        return Finalist(
            trial.number,
            refusals=values.refusals + scores.refusals,
            broken=values.broken + scores.broken,
            prompts=self.searched[0] + self.held_out,
            kl=scores.kl,
            words=self.words,
            objectives=values.objectives,
            others={
                name: score.plus(scores.others[name]) if name in scores.others else score
                for name, score in values.others.items()
            },
        )

    def _pooled(self, trials: Sequence[Trial]) -> list[Finalist]:
        return [self.pooled(trial) for trial in self.candidates(trials) if trial.number in self.measured]


def job_choice(folder: RunFolder, record: JobRecord, prompts: PromptSets, tolerance: float) -> Choice:
    """Return a job's choice, from its run folder. Raises JobError if the finalists' file is damaged."""
    resolution, file = record.resolution, folder.finalists_file
    measured = read_record(file, MeasuredFinalists) if file.exists() else MeasuredFinalists()
    return Choice(
        by_bounds=resolution is not None and resolution.choice == "bounds",
        tolerance=tolerance,
        searched=(len(prompts.bad_search), len(prompts.good_search)),
        held_out=len(prompts.bad_choice),
        counts=read_full_counts(folder),
        measured={number: scores for number, scores in measured.scores.items() if _fits(scores, prompts)},
        words=words_in(record.settings),
    )


def _fits(scores: FinalistScores, prompts: PromptSets) -> bool:
    """Return whether scores can be those of the prompts; others may have written the file."""
    counts = scores.refusals + scores.broken <= len(prompts.bad_choice)
    lengths = len(prompts.good_search) + len(prompts.good_choice), len(prompts.good_choice)
    return counts and (len(scores.kl), len(scores.forced_kl)) == lengths


def keep_finalists(folder: RunFolder, choice: Choice) -> None:
    """Write the finalists' scores. Raises MachineError."""
    ensure_folder(folder.finalists_file.parent)
    write_record(folder.finalists_file, MeasuredFinalists(scores=dict(choice.measured)))
