"""The choice among finalists, by upper confidence bounds over all prompts that they were measured on.

The search picks from many noisy counts, so its best figures are lucky ones. Finalists are measured again on prompts
that neither the directions nor the search use. What counts is how bad an edit may still be, not how good it looks
(docs/decisions/0032-choice.md). Needs no torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from job.numerics.statistics import upper_mean, wilson_interval
from job.records import DEFAULT_OBJECTIVES, ObjectiveScore, TrialScores
from job.text.behaviour import REFUSAL_WORDS, BehaviourWords

# Most finalists, the trials on the front with the fewest faults.
MOST_FINALISTS = 8
# A trial is no finalist if its share is worse than the lowest by more than these standard errors of each.
_CHANCE = 2.0
# One-sided bounds, in standard errors: a figure is worse than its bound in one case of six.
BOUND = 1.0
_TIMES = ("", "", "twice", "three times", "four times", "five times", "six times", "seven times", "eight times")


@dataclass(frozen=True)
class Finalist:
    """A finalist's figures, pooled over the search's prompts and those held out for the choice.

    Attributes:
        refusals: Refused bad prompts.
        broken: Bad prompts with a broken response that is no refusal.
        prompts: Bad prompts.
        kl: KL divergence of every good prompt, nats.
        objectives: Names of what the search minimised.
        others: Figures in objectives beyond refusals and KL.
    """

    number: int
    refusals: int
    broken: int
    prompts: int
    kl: Sequence[float]
    words: BehaviourWords = REFUSAL_WORDS
    objectives: tuple[str, ...] = DEFAULT_OBJECTIVES
    others: Mapping[str, ObjectiveScore] = field(default_factory=dict)

    @property
    def scores(self) -> TrialScores:
        """The figures as those of a trial."""
        return TrialScores(
            refusals=self.refusals,
            broken=self.broken,
            kl=self.mean_kl,
            objectives=self.objectives,
            others=dict(self.others),
        )

    @property
    def faults(self) -> float:
        """Bad prompts without a usable response, or the faults of all objectives that count."""
        return self.scores.faults(self.prompts)

    @property
    def mean_kl(self) -> float:
        """The mean KL divergence, nats."""
        return math.fsum(self.kl) / len(self.kl)

    @property
    def faults_bound(self) -> float:
        """Upper bound of the share of faults (Wilson), summed over the objectives that count."""
        return _shares(self.scores.tallies(self.prompts), BOUND)[1]

    @property
    def kl_bound(self) -> float:
        """Upper bound of the mean KL divergence, nats."""
        return upper_mean(self.kl, BOUND)

    @property
    def change_bound(self) -> tuple[float, ...]:
        """How much the edit changes elsewhere, with the bound of KL in place of its mean."""
        return self.scores.model_copy(update={"kl": self.kl_bound}).change

    def __str__(self) -> str:
        broken = f" and {self.broken} broken" if self.broken else ""
        others = "".join(f", {name} {score}" for name, score in self.others.items())
        return f"{self.refusals}/{self.prompts} {self.words.shown}{broken}{others}"


def _shares(tallies: Sequence[tuple[float, int]], deviations: float) -> tuple[float, float]:
    """Return bounds of the share of faults, summed over the objectives that count.

    Files of others may hold counts that are no part of their prompts: these count as none or all.
    """
    bounds = [wilson_interval(min(max(int(cost), 0), of), of, deviations) for cost, of in tallies]
    return sum(low for low, _ in bounds), sum(high for _, high in bounds)


def may_win(tallies: Sequence[tuple[float, int]], fewest: Sequence[tuple[float, int]], tolerance: float) -> bool:
    """Return whether faults may be within `tolerance` of the fewest but for chance; each as `TrialScores.tallies`."""
    return _shares(tallies, _CHANCE)[0] <= _shares(fewest, _CHANCE)[1] + tolerance


def are_alike(fewer: Sequence[tuple[float, int]], more: Sequence[tuple[float, int]]) -> bool:
    """Return whether the larger of two tallies of faults is within a standard error of each of the smaller."""
    return _shares(more, BOUND)[0] <= _shares(fewer, BOUND)[1]


def choose_finalist(finalists: Sequence[Finalist], tolerance: float) -> Finalist:
    """Return the finalist of the least bound of change among those within `tolerance` of the lowest bound of faults."""
    least = min(one.faults_bound for one in finalists)
    eligible = [one for one in finalists if one.faults_bound <= least + tolerance]
    return min(eligible, key=lambda one: (one.change_bound, one.faults, one.number))


def why_chosen(finalists: Sequence[Finalist], chosen: Finalist, otherwise: str = "") -> str:
    """Return a sentence that compares the chosen finalist with its closest rival.

    That is the finalist with the fewest faults or, if this is the chosen one, the next gentler finalist, or
    `otherwise`.
    """
    sentence = f"{chosen}, KL {chosen.mean_kl:.4g}"
    stronger = [one for one in finalists if one.faults < chosen.faults]
    if stronger:
        rival = min(stronger, key=lambda one: (one.faults, one.change_bound, one.number))
        change = f" at KL {rival.mean_kl:.4g}{_times(rival.mean_kl, chosen.mean_kl)}"
        return f"{sentence}; trial {rival.number} has {_counts(rival)}{change}"
    gentler = [one for one in finalists if one.change_bound < chosen.change_bound]
    if gentler:
        rival = max(gentler, key=lambda one: (one.change_bound, -one.number))
        return f"{sentence}; trial {rival.number} has KL {rival.mean_kl:.4g} but {_counts(rival)}"
    return f"{sentence}; {otherwise}" if otherwise else sentence


def _counts(one: Finalist) -> str:
    return str(one) if one.broken or one.others else str(one).replace(f" {one.words.shown}", "")


def _times(larger: float, smaller: float) -> str:
    """Return how many times the change is, or "" if it is about the same."""
    if smaller <= 0 or larger < 1.5 * smaller:
        return ""
    times = round(larger / smaller)
    return f", {_TIMES[times] if times < len(_TIMES) else f'{times} times'} the change"
