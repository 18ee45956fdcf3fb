"""Counting refusals again in answers of full length, for the trials that may be chosen.

The search may look at the beginnings of answers only. A marker in the beginning is one in the whole, so that a trial's
refusals at full length are no fewer. Therefore it is enough to count again, until none is left, those trials that
could be chosen as things stand: the choice is then that among full counts of all trials.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from pydantic import Field

from job.records import Record, Trial
from job.search import eligible
from job.workspace import RunFolder, read_record, write_record


class FullCounts(Record):
    """rescored.json: refusals counted in answers of full length, by the trial's number."""

    version: Literal[1] = 1
    refusals: dict[int, int] = Field(default_factory=dict)


def read_full_counts(folder: RunFolder) -> FullCounts:
    """Return what has been counted so far.

    Raises:
        JobError: The file does not hold such counts.
    """
    return read_record(folder.rescored_file, FullCounts) if folder.rescored_file.exists() else FullCounts()


def keep_full_counts(folder: RunFolder, counts: FullCounts, more: Mapping[int, int]) -> FullCounts:
    """Write down further counts and return all."""
    counts = FullCounts(refusals={**counts.refusals, **more})
    folder.rescored_file.parent.mkdir(exist_ok=True)
    write_record(folder.rescored_file, counts)
    return counts


def with_full_counts(trials: Sequence[Trial], counts: FullCounts) -> list[Trial]:
    """Return trials with the refusals at full length where these have been counted."""
    found = []
    for trial in trials:
        count = counts.refusals.get(trial.number, trial.values.refusals)
        found.append(trial.model_copy(update={"values": trial.values.model_copy(update={"refusals": count})}))
    return found


def next_to_rescore(
    trials: Sequence[Trial], counts: FullCounts, prompts: int, tolerance: float, batch: int
) -> list[Trial]:
    """Return the trials to count again next: the first of those that may be chosen, none when the choice is final.

    Args:
        trials: The finished trials as the search has measured them.
        counts: What has been counted so far; what comes next follows from it alone, so that a restart goes on alike.
        prompts: Number of bad prompts that refusals were counted on.
        tolerance: Share of the prompts within which trials may be chosen, see `job.search.choose`.
        batch: Trials that are evaluated together.

    Raises:
        JobError: No trial could be scored.
    """
    possible = eligible(with_full_counts(trials, counts), prompts, tolerance)
    left = sorted((trial for trial in possible if trial.number not in counts.refusals), key=lambda trial: trial.number)
    return left[:batch]
