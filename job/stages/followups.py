"""Work on a run folder after the search: export other trials, deliver later."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationError

from job.config.sections import LoadingSettings
from job.data.prompts import PromptSets
from job.errors import GateError, HeldError, UsageError
from job.lifecycle.lock import held
from job.lifecycle.outcome import missed_gate
from job.lifecycle.repair import is_exported_whole
from job.lifecycle.running import OpenJob
from job.lifecycle.start import JobStart
from job.model.files import fetch_model, headers_if_quantised, list_model, parse_model
from job.model.quantization import quantisation_in
from job.model.weight_files import WEIGHTS
from job.records import ExportFormat, Trial
from job.report.results import job_trials
from job.stages.choice import chosen_trial, is_current
from job.stages.reproduce import trials_made
from job.storage.atomic import read_record
from job.storage.events import Events
from job.storage.job_file import JobFile
from job.storage.jobs import job_settings
from job.storage.run_folder import RunFolder
from job.system.processes import this_process
from job.system.signals import StopSignals
from job.upload.targets import deliver_to_all

if TYPE_CHECKING:
    from job.stages.session import ModelSession


def export_trial(folder: RunFolder, number: int | None, form: ExportFormat | None, events: Events) -> Path:
    """Export another trial, by default the job's own choice and format; return its folder. Raises UsageError."""
    with folder.held():
        return _exported(OpenJob(folder, JobFile(folder), job_settings(folder), events), number, form)


def _exported(job: OpenJob, number: int | None, form: ExportFormat | None) -> Path:
    """Return the export of a trial, made if missing and brought up to date; the caller holds the job."""
    trials = job_trials(job.folder)
    trial, form = trial_of(job, trials, number), form or job.settings.export_format
    export, made = job.folder.export_folder(trial.number, form), trials_made(job, trials)
    prompts = read_record(job.folder.prompts_file, PromptSets)
    if not is_exported_whole(job.folder, export) or not is_current(job, export, trial, made, prompts):
        from job.stages.export import update_export
        from job.stages.session import opened_session

        job.events.log_to(job.folder.events_file)
        with opened_session(job, prompts) as session:
            update_export(session, trial, made, form)
    return export


def trial_of(job: OpenJob, trials: Sequence[Trial], number: int | None) -> Trial:
    """Return the trial of a number, or the job's own choice. Raises UsageError or JobError."""
    if number is None:
        return chosen_trial(job, trials, read_record(job.folder.prompts_file, PromptSets))
    trial = {trial.number: trial for trial in trials}.get(number)
    if trial is None:
        name = job.record.job_id
        raise UsageError(f"job {name} has no trial {number}", remedy="`abliterate front` lists the best ones")
    if trial.values.reason is not None:
        raise UsageError(f"trial {number} failed: {trial.values.reason}", remedy="choose another")
    return trial


@contextmanager
def looking(folder: RunFolder, events: Events, device: str | None = None) -> Iterator[ModelSession]:
    """Yield a job's model with directions and hooks, read-only: takes no lock, logs no event.

    Raises UsageError without directions, or HeldError if a run of the job uses this machine's accelerator.
    """
    record, settings = folder.read_job(), job_settings(folder)
    if record.resolution is None or not folder.prompts_file.exists():
        raise UsageError(f"job {record.job_id} has no finished trial yet", remedy="run it first")
    if device is not None:
        settings = settings.model_copy(update={"loading": _on_device(settings.loading, device)})
    from job.model.devices import resolve_device
    from job.stages.session import opened_session

    if _is_held_here(folder) and resolve_device(settings.loading.device).type != "cpu":
        raise HeldError(
            f"a run of job {record.job_id} is using this machine", remedy="wait for it, or give --device cpu"
        )
    job = OpenJob(folder, JobFile(folder, record), settings, events)
    with opened_session(job, read_record(folder.prompts_file, PromptSets)) as session:
        yield session


def _is_held_here(folder: RunFolder) -> bool:
    holder = folder.holder()
    return folder.is_held() and (holder is None or holder.process.boot_id == this_process().boot_id)


def _on_device(loading: LoadingSettings, device: str) -> LoadingSettings:
    try:
        return LoadingSettings.model_validate({**loading.model_dump(), "device": device, "device_map": "single"})
    except ValidationError:
        raise UsageError(f"there is no device {device}", remedy="give cpu, cuda, cuda:N or mps") from None


def upload_trial(
    start: JobStart, number: int | None, form: ExportFormat | None, events: Events, signals: StopSignals
) -> list[tuple[str, str]]:
    """Deliver a trial, exported first if needed; return the failed targets with reasons.

    By default the job's own choice and format. Raises GateError for a missed gate, or UsageError.
    """
    if not start.settings.upload:
        raise UsageError("no delivery target is given", remedy="give --upload")
    folder = start.folder
    with held(folder, start.identity, start.settings, events, signals) as hold:
        record, settings = start.trusted(events.say)
        export = _exported(OpenJob(folder, JobFile(folder, record), settings, events), number, form)
        missed = missed_gate(settings, folder.read_figures(export.name))
        if missed is not None:
            raise GateError(missed, remedy="choose another trial, or run the job again with another gate")
        events.log_to(folder.events_file)
        with hold.outward():
            return deliver_to_all(folder, export, settings, events)


def apply(model: str, file: Path, out: Path, events: Events) -> None:
    """Apply a saved edit, or its export's, to a base model; `out` is new or empty."""
    from job.export.directions_file import apply_edit

    source = parse_model(model)
    listing = list_model(source, None, events.say)
    described = fetch_model(source, listing, events.say, weights=False)
    # before the weights are downloaded
    quantisation_in(described, headers_if_quantised(source, listing, described, events.say))
    folder = fetch_model(source, listing, events.say)
    with events.progress("shards", len(list(folder.glob(f"*{WEIGHTS}")))) as advance:
        apply_edit(folder, file, out, advance)
