"""The story of a run, top to bottom.

settings → preflight → prompts → model → residuals → directions → search → choice → export → upload → report
"""

from __future__ import annotations

from job.errors import JobError
from job.lifecycle.model_folder import model_folder
from job.lifecycle.outcome import Outcome
from job.lifecycle.running import RunningJob
from job.preflight.inputs import PreflightInputs
from job.report.results import trials_so_far
from job.stages.choice import chosen_trial, is_exported, tell_choice
from job.stages.delivery import report, upload
from job.stages.preflight import checked_prompts
from job.stages.reproduce import require_original, trials_made, warn_of_differences
from job.stages.workers import Workers
from job.storage.exports import link_export
from job.storage.study_file import restore_if_damaged


def run(job: RunningJob, inputs: PreflightInputs) -> Outcome:
    """Run all stages of a job; those finished by an earlier start are skipped.

    Raises JobError, whose type tells whether another machine or other settings would help, or Stopped.
    """
    damage = _repair_study(job)
    prompts, trials = inputs.earlier.prompts, trials_so_far(job.folder)
    warn_of_differences(job)
    # An export that is complete needs neither a model nor preflight: a bad target then fails at its upload.
    if prompts is None or not is_exported(job, trials, prompts):
        workers = Workers(job, trials)
        with workers.executor:
            job.begin("preflight")
            prompts = checked_prompts(job, inputs)
            if damage is not None:
                # A failure of the search, whose repeated failures preflight has just counted.
                job.begin("search")
                raise damage
            # These import torch, which takes seconds.
            from job.directions.extraction import find_directions
            from job.stages.export import complete_export
            from job.stages.model import loaded_model, own_threads
            from job.stages.search import search
            from job.stages.session import model_session, prompt_residuals

            job.begin("model")
            source = model_folder(job.record, job.settings, job.events)
            with loaded_model(job, source, prompts, workers.count) as model:
                workers.open(model, prompts)
                with own_threads(job.settings):
                    residuals = prompt_residuals(job, model, prompts, workers.executor.evaluate)
                    basis = find_directions(residuals, job.settings.directions)
                with model_session(job, model, basis, prompts) as session:
                    trials = search(job, session, workers.executor)
                    workers.executor.close()  # the export needs their memory
                    chosen = chosen_trial(job, trials, prompts)
                    tell_choice(job, trials, chosen, prompts)
                    complete_export(job, session, chosen, trials_made(job, trials))
    # Deterministic: the trial exported above, or by an earlier start of which only the delivery is left.
    chosen = chosen_trial(job, trials, prompts)
    export = job.export_of(chosen)
    link_export(job.folder, export)
    require_original(job, export)
    outcome = upload(job, export, chosen)
    report(job, chosen, len(trials), outcome.missed_gate)
    return outcome


def _repair_study(job: RunningJob) -> JobError | None:
    try:
        if restored := restore_if_damaged(job.folder.study_file):
            job.events.say(f"warning: {restored}")
    except JobError as error:
        return error
    return None
