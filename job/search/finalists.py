"""Score finalists again on full-length responses.

The search may read only the beginnings of responses, and skips the incoherence test. A marker or breakage in the
beginning also counts in the whole, so a full count is never lower. Candidates for the choice are counted until none is
left that may be better than those counted. Counts that a race projected may be too high or too low; by all responses of
the search an earlier trial is no worse than these (`job.scoring.race`). Other objectives may find less in a whole
response than in its beginning; a trial that only its whole responses would make a candidate is then missed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

from pydantic import Field

from job.records import ObjectiveScore, Record, Trial, TrialScores
from job.storage.atomic import ensure_folder, read_record, write_record
from job.storage.run_folder import RunFolder
from job.text.behaviour import BehaviourWords


class FullCounts(Record):
    """rescored.json: counts on full-length responses, by trial number.

    Attributes:
        beginnings: The search's own scores of these trials; absent from files of former versions.
    """

    version: Literal[1] = 1
    refusals: dict[int, int] = Field(default_factory=dict)
    broken: dict[int, int] = Field(default_factory=dict)
    others: dict[int, dict[str, ObjectiveScore]] = Field(default_factory=dict, exclude_if=lambda scores: not scores)
    beginnings: dict[int, TrialScores] = Field(default_factory=dict, exclude_if=lambda scores: not scores)


def read_full_counts(folder: RunFolder) -> FullCounts:
    """Read the counts so far. Raises JobError if the file is damaged."""
    return read_record(folder.rescored_file, FullCounts) if folder.rescored_file.exists() else FullCounts()


def keep_full_counts(
    folder: RunFolder, counts: FullCounts, trials: Sequence[Trial], whole: Sequence[TrialScores]
) -> FullCounts:
    """Write the counts of further trials, whose values are still the search's, and return all."""
    more = {trial.number: scores for trial, scores in zip(trials, whole, strict=True)}
    counts = FullCounts(
        refusals=counts.refusals | {number: scores.refusals for number, scores in more.items()},
        broken=counts.broken | {number: scores.broken for number, scores in more.items()},
        others=counts.others | {number: scores.others for number, scores in more.items() if scores.others},
        beginnings=counts.beginnings | {trial.number: trial.values for trial in trials},
    )
    ensure_folder(folder.rescored_file.parent)
    write_record(folder.rescored_file, counts)
    return counts


def with_full_counts(trials: Sequence[Trial], counts: FullCounts) -> list[Trial]:
    """Replace trials' counts with full-length ones where known."""
    found = []
    for trial in trials:
        values = trial.values
        if trial.number in counts.refusals:
            broken = counts.broken.get(trial.number, values.broken)
            others = counts.others.get(trial.number, values.others)
            counted = {"refusals": counts.refusals[trial.number], "broken": broken, "others": others}
            values = values.model_copy(update={**counted, "projected_from": 0})
        found.append(trial.model_copy(update={"values": values}))
    return found


def next_to_rescore(
    trials: Sequence[Trial], counts: FullCounts, candidates: Callable[[Sequence[Trial]], list[Trial]], batch: int
) -> list[Trial]:
    """Return the trials to count next, in number order; none once all `candidates` among the trials are counted.

    Only `counts` determine the result, so a restart continues identically. If many were already counted, full length
    differs much from the search; then the total is doubled by candidates for the next rounds. Raises JobError.
    """
    known = with_full_counts(trials, counts)
    found = _open(known, counts, candidates)
    size = min(batch, max(len(found), len(counts.refusals))) if found else 0
    while len(found) < size:
        rest = [trial for trial in known if trial not in found]
        more = _open(rest, counts, candidates) if any(trial.values.reason is None for trial in rest) else []
        if not more:
            break
        found += more
    return sorted(found[:size], key=lambda trial: trial.number)


def _open(
    trials: Sequence[Trial], counts: FullCounts, candidates: Callable[[Sequence[Trial]], list[Trial]]
) -> list[Trial]:
    return [trial for trial in candidates(trials) if trial.number not in counts.refusals]


def in_words(values: TrialScores, words: BehaviourWords, asked: int | None = None) -> str:
    """Format a trial's counts, out of `asked` prompts."""
    refused = f"{values.refusals}{f'/{asked}' if asked else ''} {words.counted}"
    broken = f", {values.broken} broken answers" if values.broken else ""
    return refused + broken + "".join(f", {name} {score}" for name, score in values.others.items())
