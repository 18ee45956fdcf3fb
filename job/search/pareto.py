"""The Pareto front of trials, and the choice among its trials."""

from __future__ import annotations

import math
from collections.abc import Sequence

from job.errors import JobError
from job.records import Trial


def pareto_front(trials: Sequence[Trial]) -> list[Trial]:
    """Return the trials that no other beats in both measures, fewest unanswered prompts first.

    The measures are KL and the bad prompts that are refused or have a broken answer: a model that babbles complies with
    nothing. Of trials with equal values only the first is kept; failed trials have no place on the front.
    """
    front: list[Trial] = []
    least = math.inf
    usable = (trial for trial in trials if trial.values.reason is None)
    for trial in sorted(usable, key=lambda t: (t.values.unanswered, t.values.kl, t.number)):
        if trial.values.kl < least:
            front.append(trial)
            least = trial.values.kl
    return front


def eligible(trials: Sequence[Trial], prompts: int, tolerance: float) -> list[Trial]:
    """Return the trials of the front within tolerance of the fewest unanswered prompts.

    Args:
        trials: The finished trials.
        prompts: Number of bad prompts that were asked.
        tolerance: Share of the prompts.

    Raises:
        JobError: No trial could be scored.
    """
    front = pareto_front(trials)
    if not front:
        raise JobError("every trial failed", remedy="see the reasons in events.jsonl")
    bound = front[0].values.unanswered + tolerance * prompts
    return [trial for trial in front if trial.values.unanswered <= bound]


def choose(trials: Sequence[Trial], prompts: int, tolerance: float) -> Trial:
    """Return the eligible trial of lowest KL; see `eligible`.

    Raises:
        JobError: No trial could be scored.
    """
    possible = eligible(trials, prompts, tolerance)
    return min(possible, key=lambda t: (t.values.kl, t.values.unanswered, t.number))
