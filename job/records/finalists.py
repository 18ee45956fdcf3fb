"""Figures of finalists, by which the exported trial is chosen."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Literal, Self

from pydantic import Field

from job.numerics.statistics import quantile
from job.records.base import Record
from job.records.scores import ObjectiveScore

# Positions of the base model's own responses for a finalist's second KL divergence, which only describes it.
FORCED_TOKENS = 8


Divergence = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class FinalistScores(Record):
    """A finalist's scores beyond those of the search.

    Attributes:
        refusals: Refused bad prompts of those held out for the choice, by responses of full length.
        broken: Broken responses among the others.
        kl: KL divergence per good prompt in nats, as in the search: the search's prompts, then those held out.
        forced_kl: KL divergence per good prompt held out, mean over the first `FORCED_TOKENS` positions of the base
            model's response.
        others: Figures in objectives beyond refusals and KL, of the prompts held out; omitted without any.
    """

    refusals: int = Field(ge=0)
    broken: int = Field(ge=0)
    kl: tuple[Divergence, ...]
    forced_kl: tuple[Divergence, ...]
    others: dict[str, ObjectiveScore] = Field(default_factory=dict, exclude_if=lambda scores: not scores)


class MeasuredFinalists(Record):
    """finalists.json: scores by trial number."""

    version: Literal[1] = 1
    scores: dict[int, FinalistScores] = Field(default_factory=dict)


class ChoiceFigures(Record):
    """A finalist's figures on the prompts held out for the choice.

    Attributes:
        searched: Bad prompts of the search, for its counts.
        kl: Mean KL divergence in nats, at the positions of the search.
        forced_kl: Mean KL divergence over the first `forced_tokens` positions of the base model's own responses.
        others: Figures in objectives beyond refusals and KL; omitted without any.
    """

    searched: int
    bad_prompts: int
    refusals: int
    broken: int
    good_prompts: int
    kl: float
    forced_kl: float
    forced_tokens: int = FORCED_TOKENS
    others: dict[str, ObjectiveScore] = Field(default_factory=dict, exclude_if=lambda scores: not scores)

    @classmethod
    def of(cls, scores: FinalistScores, searched: tuple[int, int], bad_prompts: int) -> Self:
        """Return the figures without the search's prompts; `searched` are its numbers of bad and good ones."""
        kl, forced = scores.kl[searched[1] :], scores.forced_kl
        return cls(
            searched=searched[0],
            bad_prompts=bad_prompts,
            refusals=scores.refusals,
            broken=scores.broken,
            good_prompts=len(kl),
            kl=math.fsum(kl) / len(kl),
            forced_kl=math.fsum(forced) / len(forced),
            others=scores.others,
        )


class KLSpread(Record):
    """How the KL divergence varies over prompts, nats.

    Attributes:
        ninetieth: Nine tenths of the prompts have at most this.
        prompt: Index of the prompt with the largest one, from 0 in the order of its set.
    """

    median: float
    ninetieth: float
    largest: float
    prompt: int = Field(ge=0)

    @classmethod
    def of(cls, divergences: Sequence[float], places: Sequence[int]) -> Self:
        """Return the spread of the prompts' divergences; `places` are the prompts' indices in their set."""
        largest = max(divergences)
        return cls(
            median=quantile(divergences, 0.5),
            ninetieth=quantile(divergences, 0.9),
            largest=largest,
            prompt=places[list(divergences).index(largest)],
        )
