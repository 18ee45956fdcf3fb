"""Counting again in answers of full length, for the trials that may be chosen.

The search may look at the beginnings of answers only, and takes no time to ask the base model whether they are
gibberish. A marker in the beginning is one in the whole, and an answer counts as broken if its beginning is, so that
counting a trial again finds no fewer unanswered prompts. Therefore it is enough to count again, until none is left,
those trials that could be chosen as things stand: the choice is then that among full counts of all trials.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from pydantic import Field

from job.records import Record, Trial, TrialScores
from job.search.pareto import eligible
from job.storage.atomic import make_folder, read_record, write_record
from job.storage.run_folder import RunFolder


class FullCounts(Record):
    """rescored.json: what was counted in answers of full length, by the trial's number.

    Attributes:
        refusals: Refused bad prompts.
        broken: Those with a broken answer; a former version counted none.
    """

    version: Literal[1] = 1
    refusals: dict[int, int] = Field(default_factory=dict)
    broken: dict[int, int] = Field(default_factory=dict)


def read_full_counts(folder: RunFolder) -> FullCounts:
    """Return what has been counted so far.

    Raises:
        JobError: The file does not hold such counts.
    """
    return read_record(folder.rescored_file, FullCounts) if folder.rescored_file.exists() else FullCounts()


def keep_full_counts(folder: RunFolder, counts: FullCounts, more: Mapping[int, TrialScores]) -> FullCounts:
    """Write down further counts and return all."""
    counts = FullCounts(
        refusals=counts.refusals | {number: scores.refusals for number, scores in more.items()},
        broken=counts.broken | {number: scores.broken for number, scores in more.items()},
    )
    make_folder(folder.rescored_file.parent)
    write_record(folder.rescored_file, counts)
    return counts


def with_full_counts(trials: Sequence[Trial], counts: FullCounts) -> list[Trial]:
    """Return trials with the counts at full length where there are any."""
    found = []
    for trial in trials:
        values = trial.values
        if trial.number in counts.refusals:
            broken = counts.broken.get(trial.number, values.broken)
            values = values.model_copy(update={"refusals": counts.refusals[trial.number], "broken": broken})
        found.append(trial.model_copy(update={"values": values}))
    return found


def next_to_rescore(
    trials: Sequence[Trial], counts: FullCounts, prompts: int, tolerance: float, batch: int
) -> list[Trial]:
    """Return the trials to count again next, in number order: those that may be chosen, none when the choice is final.

    Where many had to be counted already, full length has much to add to what the search has counted: then those go
    along that may be chosen should these not hold, as many in all as have been counted so far.

    Args:
        trials: The finished trials as the search has measured them.
        counts: What has been counted so far; what comes next follows from it alone, so that a restart goes on alike.
        prompts: Number of bad prompts that were asked.
        tolerance: Share of the prompts within which trials may be chosen, see `job.search.pareto.choose`.
        batch: Trials that are evaluated together.

    Raises:
        JobError: No trial could be scored.
    """
    known = with_full_counts(trials, counts)
    found = _open(known, counts, prompts, tolerance)
    size = min(batch, max(len(found), len(counts.refusals))) if found else 0
    while len(found) < size:
        rest = [trial for trial in known if trial not in found]
        more = _open(rest, counts, prompts, tolerance) if any(trial.values.reason is None for trial in rest) else []
        if not more:
            break
        found += more
    return sorted(found[:size], key=lambda trial: trial.number)


def _open(trials: Sequence[Trial], counts: FullCounts, prompts: int, tolerance: float) -> list[Trial]:
    """Return those that may be chosen and have not been counted again."""
    return [trial for trial in eligible(trials, prompts, tolerance) if trial.number not in counts.refusals]


def in_words(values: TrialScores, asked: int | None = None) -> str:
    """Return a trial's counts in words, of so many prompts asked."""
    refused = f"{values.refusals}{f'/{asked}' if asked else ''} refusals"
    return f"{refused}, {values.broken} broken answers" if values.broken else refused
