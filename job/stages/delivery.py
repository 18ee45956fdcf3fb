"""The end of a job: gates, delivery to all targets, final state and reports."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from job.lifecycle.outcome import Outcome, missed_gate, outcome_of
from job.lifecycle.running import RunningJob
from job.records import State, Trial
from job.report.markdown import write_reports
from job.report.run_view import RunView
from job.storage.atomic import write_record
from job.upload.targets import deliver_to_all


def upload(job: RunningJob, export: Path, trial: Trial) -> Outcome:
    """Upload an export to all targets unless it misses a gate. Raises HeldError if another run took over."""
    outcome = outcome_of(job.folder, trial.number, export)
    for warning in RunView(job.folder).warnings:
        job.events.emit("doubt", f"warning: {warning}")
    missed = missed_gate(job.settings, outcome.edited)
    if missed is not None:
        job.events.emit("gate_missed", f"the result is not delivered: {missed}")
        return replace(outcome, missed_gate=missed)
    job.begin("upload")
    if not job.settings.upload:
        return outcome  # nothing is published, so an expired lease does no harm
    with job.lock.outward():
        failed = deliver_to_all(job.folder, export, job.settings, job.events)
    return replace(outcome, failed_targets=tuple(failed))


def report(job: RunningJob, trial: Trial, trials: int, missed: str | None) -> None:
    """Write a finished job's reports, then its final state; `missed` is the missed gate or None."""
    finished = _finished(job, trial, trials, missed)
    job.meter.tick()  # the reports tell the time so far
    write_reports(job.folder, finished)
    write_record(job.folder.state_file, finished)
    job.events.emit("job_finished", chosen=trial.number)


def _finished(job: RunningJob, trial: Trial, trials: int, missed: str | None) -> State:
    settings, wanted = job.settings, job.trials_wanted
    if trials >= wanted or not job.record.searches:
        return State(state="finished", reason=missed, trials=wanted, chosen=trial.number)
    return State(
        state="finished",
        reason=missed or "budget",
        trials=trials,
        chosen=trial.number,
        max_hours=settings.max_hours,
        max_cost=settings.max_cost,
    )
