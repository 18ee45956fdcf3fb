"""Choice of the exported trial, and whether it is final."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from job.data.prompts import PromptSets
from job.export.reproduction import Reproduction
from job.lifecycle.running import OpenJob
from job.records import ChoiceFigures, Trial
from job.report.console import choice_text
from job.search.bounds import MOST_FINALISTS
from job.search.choice import Choice, job_choice
from job.search.finalists import FullCounts, next_to_rescore, read_full_counts, with_full_counts
from job.stages.reproduce import original_of, trials_made
from job.storage.atomic import read_record
from job.storage.exports import REPRODUCE, is_sealed


def choice_of(job: OpenJob, prompts: PromptSets) -> Choice:
    """Return a job's choice as far as it is measured. Raises JobError if its file is damaged."""
    return job_choice(job.folder, job.record, prompts, job.settings.choice.refusal_tolerance)


def chosen_trial(job: OpenJob, trials: Sequence[Trial], prompts: PromptSets) -> Trial:
    """Return the trial that the job exports. Raises JobError if no trial could be scored."""
    return choice_of(job, prompts).chosen(trials)


def uncounted(job: OpenJob, trials: Sequence[Trial], choice: Choice, counts: FullCounts) -> list[Trial]:
    """Return the candidates to score next on full-length responses, if the search's were shorter."""
    scoring, batch = job.settings.scoring, job.record.trials_per_batch
    if scoring.effective_search_tokens == scoring.answer_tokens and scoring.gibberish is None:
        return []
    most = max(batch, MOST_FINALISTS) if choice.by_bounds else batch
    so_far = replace(choice, counts=counts)
    return next_to_rescore(trials, counts, so_far.candidates, most)


def finalists_left(job: OpenJob, trials: Sequence[Trial], prompts: PromptSets) -> bool:
    """Return whether finalists have yet to be scored on full-length responses, or measured for the choice."""
    if not job.record.searches:
        return False
    choice, counts = choice_of(job, prompts), read_full_counts(job.folder)
    known = with_full_counts(trials, counts)
    return bool(uncounted(job, trials, choice, counts) or choice.unmeasured(known))


def finalist_batches(job: OpenJob, prompts: PromptSets) -> float:
    """Return how many batches of the search take as long as measuring finalists, if no response ends early."""
    if not choice_of(job, prompts).by_bounds:
        return 0.0
    scoring, searched = job.settings.scoring, len(prompts.bad_search)
    longer = scoring.answer_tokens / scoring.effective_search_tokens
    return MOST_FINALISTS / job.record.trials_per_batch * longer * (searched + len(prompts.bad_choice)) / searched


def is_searched(job: OpenJob, trials: Sequence[Trial]) -> bool:
    """Return whether the search is complete, or this job does no search."""
    return not job.record.searches or len(trials) >= job.trials_wanted


def is_exported(job: OpenJob, trials: Sequence[Trial], prompts: PromptSets | None) -> bool:
    """Return whether search, choice and export are done, so that the model is not needed."""
    if prompts is None or not is_searched(job, trials) or finalists_left(job, trials, prompts):
        return False
    chosen = chosen_trial(job, trials, prompts)
    export = job.export_of(chosen)
    return is_sealed(export) and is_current(job, export, chosen, trials_made(job, trials), prompts)


def is_current(job: OpenJob, export: Path, trial: Trial, trials: int, prompts: PromptSets) -> bool:
    """Return whether a finished export states the search as it is now; it can be extended after an export."""
    made = read_record(export / REPRODUCE, Reproduction)
    return (made.trials, made.trial, made.choice) == (trials, trial, choice_figures(job, trial, prompts))


def choice_figures(job: OpenJob, trial: Trial, prompts: PromptSets) -> ChoiceFigures | None:
    """Return a trial's figures on the prompts held out for the choice, or the original's if the edit was given."""
    if not job.record.searches and (original := original_of(job)) is not None:
        return original.choice
    return choice_of(job, prompts).figures(trial.number)


def tell_choice(job: OpenJob, trials: Sequence[Trial], chosen: Trial, prompts: PromptSets) -> None:
    """Say which trial is chosen and why, if this job searched."""
    if job.record.searches:
        reason = choice_of(job, prompts).reason(trials)
        if reason is None:  # by the rule of former versions
            reason = choice_text(
                trials, chosen, len(prompts.bad_search), job.settings.choice.refusal_tolerance, job.words
            )
        job.events.emit("choice", f"chosen: trial {chosen.number}: {reason}", number=chosen.number)
