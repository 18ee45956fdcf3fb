"""Choice of the exported trial, and whether it is final."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from job.data.prompts import PromptSets
from job.export.reproduction import Reproduction
from job.lifecycle.running import OpenJob
from job.records import Trial
from job.search.finalists import next_to_rescore, read_full_counts
from job.search.pareto import choose
from job.stages.reproduce import trials_made
from job.storage.atomic import read_record
from job.storage.exports import REPRODUCE, is_sealed


def chosen_trial(job: OpenJob, trials: Sequence[Trial], prompts: PromptSets) -> Trial:
    """Return the trial that the job exports. Raises JobError if no trial could be scored."""
    return choose(trials, len(prompts.bad_search), job.settings.choice.refusal_tolerance)


def finalists_left(job: OpenJob, trials: Sequence[Trial], prompts: PromptSets) -> bool:
    """Return whether finalists have yet to be scored on full-length responses."""
    scoring, tolerance = job.settings.scoring, job.settings.choice.refusal_tolerance
    already_full_length = scoring.effective_search_tokens == scoring.answer_tokens and scoring.gibberish is None
    if not job.record.searches or already_full_length:
        return False
    return bool(next_to_rescore(trials, read_full_counts(job.folder), len(prompts.bad_search), tolerance, 1))


def is_searched(job: OpenJob, trials: Sequence[Trial]) -> bool:
    """Return whether the search is complete, or this job does no search."""
    return not job.record.searches or len(trials) >= job.settings.trials


def is_exported(job: OpenJob, trials: Sequence[Trial], prompts: PromptSets | None) -> bool:
    """Return whether search, choice and export are done, so that the model is not needed."""
    if prompts is None or not is_searched(job, trials) or finalists_left(job, trials, prompts):
        return False
    export = job.export_of(chosen_trial(job, trials, prompts))
    return is_sealed(export) and is_current(export, trials_made(job, trials))


def is_current(export: Path, trials: int) -> bool:
    """Return whether a finished export states that number of trials; a search can be extended after its export."""
    return read_record(export / REPRODUCE, Reproduction).trials == trials
