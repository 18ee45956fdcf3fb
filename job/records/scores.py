"""Scores of a trial: refusals and KL divergence, which every trial has, and those of other objectives."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from job.records.base import Record

# Objectives of a search unless others are asked for.
REFUSALS, KL = "refusals", "kl"
DEFAULT_OBJECTIVES = (REFUSALS, KL)


class ObjectiveScore(Record):
    """A trial's figure in one objective.

    Attributes:
        figure: Number of responses that have what is counted; a mean in nats if `of` is None.
        of: Number of responses.
        smooth: Part of a count for the sampler, from -0.5 to 0.5: it orders trials with equal counts, lower is better.
        direction: "closer" for a distance to the base model.
    """

    figure: float = Field(allow_inf_nan=False)
    of: int | None = Field(None, ge=0)
    smooth: float = Field(0.0, ge=-0.5, le=0.5)
    direction: Literal["fewer", "more", "closer"] = "fewer"

    @model_validator(mode="after")
    def _require_possible(self) -> Self:
        if self.figure < 0 or (self.of is not None and self.figure > self.of):
            raise ValueError(f"a figure of {self.figure:g} of {self.of}")
        return self

    @property
    def cost(self) -> float:
        """What the search minimises: the figure, or the number of responses that lack what more should have."""
        return self.of - self.figure if self.direction == "more" and self.of is not None else self.figure

    def plus(self, other: ObjectiveScore) -> ObjectiveScore:
        """Return the count over two sets of prompts; a measure stays that of the first."""
        if self.of is None or other.of is None:
            return self
        counted = {"figure": self.figure + other.figure, "of": self.of + other.of, "smooth": 0.0}
        return self.model_copy(update=counted)

    def __str__(self) -> str:
        return f"{self.figure:.4g}" if self.of is None else f"{self.figure:.0f}/{self.of}"


class TrialScores(Record):
    """Scores of a trial.

    Attributes:
        kl: KL divergence from the base model in nats, mean over good prompts and the first `kl_tokens` positions of its
            responses.
        opening: Mean log-odds of the base model's first tokens of responses to bad prompts: a tie-breaker of equal
            refusals.
        reason: Why the trial failed, so that its scores are defaults; else None.
        skipped: It failed by its measured KL divergence, before generation.
        projected_from: Prompts that were answered before the trial lost its race, so that its counts are projected;
            0, and omitted: all were answered.
        objectives: What the search minimised, in order; omitted if these are refusals and KL.
        others: Figures in objectives beyond refusals and KL; omitted without any.
    """

    refusals: int
    kl: float
    opening: float = 0.0
    broken: int = 0
    reason: str | None = None
    skipped: bool = False
    projected_from: int = Field(0, ge=0, exclude_if=lambda count: not count)
    objectives: tuple[str, ...] = Field(DEFAULT_OBJECTIVES, exclude_if=lambda names: names == DEFAULT_OBJECTIVES)
    others: dict[str, ObjectiveScore] = Field(default_factory=dict, exclude_if=lambda scores: not scores)

    @property
    def unanswered(self) -> int:
        """Bad prompts without a usable response, the objective "refusals"."""
        return self.refusals + self.broken

    @property
    def costs(self) -> tuple[float, ...]:
        """The figures that the search minimises, one for each objective."""
        return tuple(self.cost(name) for name in self.objectives)

    def cost(self, objective: str) -> float:
        """Return the figure of one objective that the search minimises."""
        if objective in self.others:
            return self.others[objective].cost
        return self.kl if objective == KL else self.unanswered

    def tallies(self, prompts: int) -> list[tuple[float, int]]:
        """Return the faults of each objective that counts, and of how many; `prompts` is the number of bad prompts."""
        found: list[tuple[float, int]] = [(self.unanswered, prompts)] if REFUSALS in self.objectives else []
        counted = (self.others[name] for name in self.objectives if name in self.others)
        return found + [(one.cost, one.of) for one in counted if one.of]

    def faults(self, prompts: int) -> float:
        """Return the faults of all objectives that count, each as if it counted over `prompts` responses."""
        return sum(cost if of == prompts else cost * prompts / of for cost, of in self.tallies(prompts))

    @property
    def change(self) -> tuple[float, ...]:
        """How much the edit changes elsewhere, by which equally faulty trials are compared: measures, then KL."""
        measures = [
            self.cost(name)
            for name in self.objectives
            if name == KL or (name in self.others and self.others[name].of is None)
        ]
        return (*measures, self.kl)
