"""The Pareto front of trials, and the choice on it."""

from __future__ import annotations

import math
from collections.abc import Sequence

from job.errors import JobError
from job.records import Trial


def pareto_front(trials: Sequence[Trial]) -> list[Trial]:
    """Return the Pareto-optimal trials, fewest unanswered prompts first.

    The objectives are KL and the bad prompts with a refusal or a broken response: gibberish is no compliance. Of equal
    trials the first is kept; failed ones are excluded.
    """
    front: list[Trial] = []
    least = math.inf
    scored = (trial for trial in trials if trial.values.reason is None)
    for trial in sorted(scored, key=lambda t: (t.values.unanswered, t.values.kl, t.number)):
        if trial.values.kl < least:
            front.append(trial)
            least = trial.values.kl
    return front


def eligible(trials: Sequence[Trial], prompts: int, tolerance: float) -> list[Trial]:
    """Return the trials within `tolerance` (a share of `prompts`) of the front's fewest unanswered. Raises JobError."""
    front = pareto_front(trials)
    if not front:
        raise JobError("every trial failed", remedy="see the reasons in events.jsonl")
    bound = front[0].values.unanswered + tolerance * prompts
    return [trial for trial in front if trial.values.unanswered <= bound]


def choose(trials: Sequence[Trial], prompts: int, tolerance: float) -> Trial:
    """Return the eligible trial of lowest KL; see `eligible`."""
    eligible_trials = eligible(trials, prompts, tolerance)
    return min(eligible_trials, key=lambda t: (t.values.kl, t.values.unanswered, t.number))
