"""Objectives that judge responses: scorers that give every trial a count and a smooth part for the sampler.

They always run in the main process, also for responses that workers generated. Needs no torch unless a scorer does.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, get_args

from job.config.scorers import Direction, Objective, PromptKind, judging
from job.errors import ImpossibleJobError, JobError, in_one_line
from job.model.device_faults import is_of_device
from job.records import DEFAULT_OBJECTIVES, ObjectiveScore, TrialScores
from job.scoring.broken import Exchange
from job.scoring.detectors import COUNTS, Context, Scorer, degree, judgements, scorer_factory
from job.scoring.trial_scorer import TrialOutcome


@contextmanager
def _explained(what: str) -> Iterator[None]:
    """Raise ImpossibleJobError for whatever a scorer raises, but for our errors and those of memory and device."""
    try:
        yield
    except JobError:
        raise
    except Exception as error:  # others' code may raise anything
        if is_of_device(error):
            raise
        remedy = "correct it, or choose another objective"
        raise ImpossibleJobError(f"{what}: {in_one_line(error)}", remedy=remedy) from error


@dataclass(frozen=True)
class ResponseObjective:
    """A scorer with the prompts whose responses count, and whether fewer or more of them should.

    A broken response is at fault, whatever the scorer says: gibberish is no better answer.
    """

    name: str
    scorer: Scorer
    prompts: PromptKind
    direction: Direction

    @classmethod
    def made(cls, objective: Objective, context: Context) -> ResponseObjective:
        """Return an objective with its scorer. Raises JobError if the scorer cannot be made."""
        with _explained(f"the scorer {objective.scorer} cannot be used"):
            factory = scorer_factory(objective.scorer)
            scorer = factory(context)
        prompts = objective.prompts or _own(factory, "prompts", PromptKind, "bad")
        return cls(
            objective.name, scorer, prompts, objective.direction or _own(factory, "direction", Direction, "fewer")
        )

    def judged(self, trials: Sequence[Sequence[Exchange]]) -> list[ObjectiveScore]:
        """Return the score of each trial's responses. Raises JobError if the scorer fails."""
        with _explained(f"the scorer {self.name} has failed"):
            found = judgements(self.scorer, [one for trial in trials for one in trial])
        scores, start = [], 0
        for trial in trials:
            degrees = list(map(degree, found[start : start + len(trial)]))
            scores.append(self._score(trial, degrees))
            start += len(trial)
        return scores

    def _score(self, trial: Sequence[Exchange], degrees: Sequence[float]) -> ObjectiveScore:
        fewer = self.direction == "fewer"
        worst = 1.0 if fewer else 0.0
        degrees = [worst if one.broken else share for one, share in zip(trial, degrees, strict=True)]
        mean = sum(degrees) / len(degrees) if degrees else worst
        return ObjectiveScore(
            figure=sum(share >= COUNTS for share in degrees),
            of=len(trial),
            # Rounded, since a sum of shares may be off by an ulp.
            smooth=round((mean if fewer else 1 - mean) - 0.5, 12),
            direction=self.direction,
        )

    def failed(self, prompts: int) -> ObjectiveScore:
        """Return the score of a trial without responses."""
        figure = prompts if self.direction == "fewer" else 0
        return ObjectiveScore(figure=figure, of=prompts, smooth=0.5, direction=self.direction)

    def chosen(self, bad: Sequence[Exchange], good: Sequence[Exchange]) -> list[Exchange]:
        """Return the responses that count."""
        return [*(bad if self.prompts != "good" else ()), *(good if self.prompts != "bad" else ())]


def _own(factory: object, name: str, kinds: Any, otherwise: Any) -> Any:
    """Return what a scorer's factory says of itself, if it does."""
    said = getattr(factory, name, otherwise)
    if said not in get_args(kinds):
        raise ImpossibleJobError(
            f"a scorer's {name} is {said!r}", remedy=f"its package has to choose from {', '.join(get_args(kinds))}"
        )
    return said


@dataclass(frozen=True)
class Objectives:
    """All objectives of a search.

    Attributes:
        names: Their names, in order.
        responses: Those that judge responses.
        searched: Numbers of bad and good prompts of the search, for trials without responses.
    """

    names: tuple[str, ...]
    responses: tuple[ResponseObjective, ...]
    searched: tuple[int, int]

    @classmethod
    def made(cls, names: Sequence[str], context: Context, searched: tuple[int, int]) -> Objectives:
        """Return a search's objectives with their scorers. Raises JobError if one cannot be made."""
        return cls(tuple(names), tuple(ResponseObjective.made(one, context) for one in judging([*names])), searched)

    @property
    def keep(self) -> tuple[str, ...]:
        """Kinds of prompts whose responses are needed."""
        kinds = {one.prompts for one in self.responses}
        return tuple(kind for kind in ("bad", "good") if {kind, "both"} & kinds)

    def scored(self, outcomes: Sequence[TrialOutcome]) -> list[TrialScores]:
        """Return the trials' scores in all objectives. Raises JobError if a scorer fails."""
        if self.names == DEFAULT_OBJECTIVES:
            return [outcome.scores for outcome in outcomes]
        others = self.others(outcomes, self.searched)
        return [
            outcome.scores.model_copy(update={"objectives": self.names, "others": {**outcome.scores.others, **found}})
            for outcome, found in zip(outcomes, others, strict=True)
        ]

    def others(self, outcomes: Sequence[TrialOutcome], prompts: tuple[int, int]) -> list[dict[str, ObjectiveScore]]:
        """Return the trials' scores by objective; `prompts` are the numbers of bad and good ones. Raises JobError."""
        heard = [outcome for outcome in outcomes if outcome.scores.reason is None]
        found: list[dict[str, ObjectiveScore]] = [{} for _ in outcomes]
        for one in self.responses:
            scores = iter(one.judged([one.chosen(outcome.bad, outcome.good) for outcome in heard]))
            bad, good = prompts
            asked = (bad if one.prompts != "good" else 0) + (good if one.prompts != "bad" else 0)
            for outcome, own in zip(outcomes, found, strict=True):
                own[one.name] = next(scores) if outcome.scores.reason is None else one.failed(asked)
        return found

    def of_base(self, good: Sequence[Exchange], bad: Sequence[Exchange]) -> Mapping[str, ObjectiveScore]:
        """Return the base model's figures from its whole responses. Raises JobError if a scorer fails."""
        return {one.name: one.judged([one.chosen(bad, good)])[0] for one in self.responses}
