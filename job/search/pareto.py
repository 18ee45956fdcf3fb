"""The Pareto front of trials, and the choice on it."""

from __future__ import annotations

from collections.abc import Sequence

from job.errors import JobError
from job.records import Trial


def pareto_front(trials: Sequence[Trial]) -> list[Trial]:
    """Return the Pareto-optimal trials in the order of their objectives, by default fewest unanswered prompts first.

    "refusals" counts bad prompts with a refusal or a broken response: gibberish is no compliance. Of equal trials the
    first is kept; failed ones are excluded.
    """
    front: list[tuple[tuple[float, ...], Trial]] = []
    scored = [(trial.values.costs, trial) for trial in trials if trial.values.reason is None]
    # In this order none dominates an earlier one.
    for costs, trial in sorted(scored, key=lambda pair: (pair[0], pair[1].values.kl, pair[1].number)):
        if not any(all(a <= b for a, b in zip(kept, costs, strict=True)) for kept, _ in front):
            front.append((costs, trial))
    return [trial for _, trial in front]


def fewest_faults(trials: Sequence[Trial], prompts: int) -> float:
    """Return the fewest faults of the trials; `prompts` is the number of bad prompts."""
    return min(trial.values.faults(prompts) for trial in trials)


def eligible(trials: Sequence[Trial], prompts: int, tolerance: float) -> list[Trial]:
    """Return the trials within `tolerance` (a share of `prompts`) of the front's fewest faults. Raises JobError."""
    front = pareto_front(trials)
    if not front:
        raise JobError("every trial failed", remedy="see the reasons in events.jsonl")
    bound = fewest_faults(front, prompts) + tolerance * prompts
    return [trial for trial in front if trial.values.faults(prompts) <= bound]


def choose(trials: Sequence[Trial], prompts: int, tolerance: float) -> Trial:
    """Return the eligible trial of the least change; see `eligible`."""
    eligible_trials = eligible(trials, prompts, tolerance)
    return min(eligible_trials, key=lambda t: (t.values.change, t.values.faults(prompts), t.number))
