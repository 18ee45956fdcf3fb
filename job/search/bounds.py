"""The choice among finalists, by upper confidence bounds over all prompts that they were measured on.

The search picks from many noisy counts, so its best figures are lucky ones. Finalists are measured again on prompts
that neither the directions nor the search use. What counts is how bad an edit may still be, not how good it looks
(docs/decisions/0032-choice.md). Needs no torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from job.numerics.statistics import upper_mean, wilson_interval
from job.text.behaviour import REFUSALS, BehaviourWords

# Most finalists, the trials on the front with the fewest unanswered prompts.
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
    """

    number: int
    refusals: int
    broken: int
    prompts: int
    kl: Sequence[float]
    words: BehaviourWords = REFUSALS

    @property
    def unanswered(self) -> int:
        """Bad prompts without a usable response."""
        return self.refusals + self.broken

    @property
    def mean_kl(self) -> float:
        """The mean KL divergence, nats."""
        return math.fsum(self.kl) / len(self.kl)

    @property
    def unanswered_bound(self) -> float:
        """Upper bound of the share of unanswered prompts (Wilson)."""
        return wilson_interval(self.unanswered, self.prompts, BOUND)[1]

    @property
    def kl_bound(self) -> float:
        """Upper bound of the mean KL divergence, nats."""
        return upper_mean(self.kl, BOUND)

    def __str__(self) -> str:
        broken = f" and {self.broken} broken" if self.broken else ""
        return f"{self.refusals}/{self.prompts} {self.words.shown}{broken}"


def may_win(unanswered: int, fewest: int, prompts: int, tolerance: float) -> bool:
    """Return whether a count may be within `tolerance` of the fewest but for chance."""
    least = wilson_interval(unanswered, prompts, _CHANCE)[0]
    return least <= wilson_interval(fewest, prompts, _CHANCE)[1] + tolerance


def choose_finalist(finalists: Sequence[Finalist], tolerance: float) -> Finalist:
    """Return the finalist of the lowest KL bound among those within `tolerance` of the lowest unanswered bound."""
    least = min(one.unanswered_bound for one in finalists)
    eligible = [one for one in finalists if one.unanswered_bound <= least + tolerance]
    return min(eligible, key=lambda one: (one.kl_bound, one.unanswered, one.number))


def why_chosen(finalists: Sequence[Finalist], chosen: Finalist, otherwise: str = "") -> str:
    """Return a sentence that compares the chosen finalist with its closest rival.

    That is the finalist with the fewest unanswered prompts or, if this is the chosen one, the next gentler finalist, or
    `otherwise`.
    """
    sentence = f"{chosen}, KL {chosen.mean_kl:.4g}"
    stronger = [one for one in finalists if one.unanswered < chosen.unanswered]
    if stronger:
        rival = min(stronger, key=lambda one: (one.unanswered, one.kl_bound, one.number))
        change = f" at KL {rival.mean_kl:.4g}{_times(rival.mean_kl, chosen.mean_kl)}"
        return f"{sentence}; trial {rival.number} has {_counts(rival)}{change}"
    gentler = [one for one in finalists if one.kl_bound < chosen.kl_bound]
    if gentler:
        rival = max(gentler, key=lambda one: (one.kl_bound, -one.number))
        return f"{sentence}; trial {rival.number} has KL {rival.mean_kl:.4g} but {_counts(rival)}"
    return f"{sentence}; {otherwise}" if otherwise else sentence


def _counts(one: Finalist) -> str:
    return str(one).replace(f" {one.words.shown}", "") if not one.broken else str(one)


def _times(larger: float, smaller: float) -> str:
    """Return how many times the change is, or "" if it is about the same."""
    if smaller <= 0 or larger < 1.5 * smaller:
        return ""
    times = round(larger / smaller)
    return f", {_TIMES[times] if times < len(_TIMES) else f'{times} times'} the change"
