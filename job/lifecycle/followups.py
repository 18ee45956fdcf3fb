"""What is done with a job's run folder after its search: other points of the front, later deliveries."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from job.config.load import asked_ends, leaves
from job.config.origins import HERE, left_out_line
from job.config.schema import ENDS, LoadingSettings, Settings
from job.data.prompts import PromptSets
from job.errors import GateError, HeldError, UsageError
from job.lifecycle.locate import Whereabouts
from job.lifecycle.lock import held
from job.lifecycle.model_folder import model_folder
from job.lifecycle.outcome import missed_gate
from job.lifecycle.start import JobStart
from job.mirror.vetting import as_given, require_same_contents, with_trust
from job.model.files import WEIGHTS, fetch_model, list_model, parse_model
from job.model.quantization import quantisation_in
from job.records import ExportFormat, Figures, JobRecord, Trial
from job.report.run_view import job_trials
from job.search.optimizer import choose
from job.storage.atomic import read_record
from job.storage.events import Events
from job.storage.exports import is_sealed
from job.storage.identity import stored
from job.storage.jobs import job_settings
from job.storage.run_folder import RunFolder
from job.system.processes import this_process
from job.system.signals import StopSignals
from job.system.tempdirs import scratch
from job.upload.targets import deliver_to_all

if TYPE_CHECKING:
    from job.lifecycle.session import Workbench


def resumption(
    where: Whereabouts,
    ends: Mapping[str, str | None] | None = None,
    say: Callable[[str], None] = lambda _: None,
    **others: object,
) -> JobStart:
    """Return what a job is continued with, from its run folder or its checkpoint alone.

    Of a checkpoint, only what may come from one is taken (`job.mirror.vetting`).

    Args:
        where: The job.
        ends: `when_done` and `when_failed` as given on the command line; what an earlier start was given is not used.
        say: Told what was not taken from the checkpoint.
        **others: Settings that only extend it.

    Raises:
        UsageError: There is no such job, or it runs code that is not trusted here.
        DeliveryError: The checkpoint cannot be reached, or is not what it was.
    """
    options = {name: value for name, value in (ends or {}).items() if value is not None}
    # As for all settings, --set counts last, then options, then the environment.
    given = {**where.given, **asked_ends(options), **others}
    given |= {name: value for name, value in where.assigned.items() if name in ENDS}
    if where.checkpoint is None:
        folder = where.folder()
        record, settings = folder.read_job(), job_settings(folder, whole=True, **as_given(given))
        with_trust(record, settings, given)
    else:
        with where.mirror() as mirror, scratch("mirror") as place:
            head = where.mirrored(mirror)
            folder = RunFolder(where.workspace / head.job_id)
            fetched = mirror.fetch(head.job_id, place)
            record = fetched.folder.read_job()
            here = as_given({**_of_this_side(folder), **given})
            settings = job_settings(fetched.folder, whole=True, **here, workspace=str(where.workspace))
            with_trust(record, settings, given, before=folder.read_job() if folder.job_file.exists() else None)
            require_same_contents(record, settings, prompts=not fetched.folder.prompts_file.exists())
        if line := left_out_line(mirror.uri, fetched.left_out, leaves(settings.model_dump(mode="json"))):
            say(line)

    first = record
    used = {name: value for name, value in leaves(settings.model_dump(mode="json")).items() if name in HERE}

    def opened() -> tuple[JobRecord, Settings]:
        # The run folder may have been filled from the checkpoint since, which may have changed meanwhile.
        record, found = folder.read_job(), job_settings(folder, whole=True, **as_given({**used, **given}))
        with_trust(record, found, given, before=first)
        if where.checkpoint is not None:
            require_same_contents(record, found, prompts=not folder.prompts_file.exists())
        return record.model_copy(update={"settings": stored(found)}), found

    return JobStart(folder, record.identity, settings, opened)


def _of_this_side(folder: RunFolder) -> dict[str, Any]:
    """Return what a run folder on this machine says of this machine; nothing where there is none."""
    if not folder.job_file.exists():
        return {}
    return {name: value for name, value in leaves(folder.read_job().settings).items() if name in HERE - {"workspace"}}


def export_trial(folder: RunFolder, number: int | None, form: ExportFormat | None, events: Events) -> Path:
    """Export a trial of a job beside what it has exported, from its run folder alone.

    Args:
        folder: The run folder.
        number: The trial; None for the one that the job would choose.
        form: What is written; None for the job's format.
        events: Where progress goes.

    Returns:
        The folder of the export.

    Raises:
        UsageError: There is no such trial.
    """
    with folder.held():
        return _exported(folder, folder.read_job(), job_settings(folder), number, form, events)


def _exported(
    folder: RunFolder,
    record: JobRecord,
    settings: Settings,
    number: int | None,
    form: ExportFormat | None,
    events: Events,
) -> Path:
    """Return the export of a trial, made if it is not there; the caller holds the job."""
    trials = job_trials(folder)
    trial = trial_of(folder, record, settings, trials, number)
    form = form or settings.export_format
    export = folder.export_folder(trial.number, form)
    if not is_sealed(export):
        _export(folder, record, settings, lambda bench: bench.export(trial, len(trials), form), events)
    return export


def trial_of(
    folder: RunFolder, record: JobRecord, settings: Settings, trials: Sequence[Trial], number: int | None
) -> Trial:
    """Return the trial of a number, or the one that the job would choose.

    Raises:
        UsageError: There is no such trial, or it failed.
        JobError: None is given, and no trial could be scored.
    """
    if number is None:
        asked = len(read_record(folder.prompts_file, PromptSets).bad_search)
        return choose(trials, asked, settings.choice.refusal_tolerance)
    found = {trial.number: trial for trial in trials}.get(number)
    if found is None:
        raise UsageError(f"job {record.job_id} has no trial {number}", remedy="`abliterate front` lists the best ones")
    if found.values.reason is not None:
        raise UsageError(f"trial {number} failed: {found.values.reason}", remedy="choose another")
    return found


def _export(
    folder: RunFolder, record: JobRecord, settings: Settings, export: Callable[[Workbench], None], events: Events
) -> None:
    from job.lifecycle.session import Workbench

    events.log_to(folder.events_file)
    prompts = read_record(folder.prompts_file, PromptSets)
    model = model_folder(record, settings, events)
    with Workbench.prepared(folder, record, settings, model, prompts, events) as bench:
        export(bench)


@contextmanager
def looking(folder: RunFolder, events: Events, device: str | None = None) -> Iterator[Workbench]:
    """Yield a job's model with its directions and hooks for what only looks: no lock is taken, no event is logged.

    Args:
        folder: The run folder.
        events: Where progress goes.
        device: Another device than the job's.

    Raises:
        UsageError: The job has not found its directions yet, or there is no such device.
        HeldError: A run of the job computes on this machine's accelerator, of which the model would take a part.
    """
    record, settings = folder.read_job(), job_settings(folder)
    if record.resolution is None or not folder.prompts_file.exists():
        raise UsageError(f"job {record.job_id} has not got as far as a trial", remedy="run it first")
    if device is not None:
        settings = settings.model_copy(update={"loading": _on_device(settings.loading, device)})
    from job.lifecycle.session import Workbench
    from job.model.loading import resolve_device

    if _is_held_here(folder) and resolve_device(settings.loading.device).type != "cpu":
        raise HeldError(
            f"a run of job {record.job_id} computes on this machine", remedy="wait for it, or give --device cpu"
        )
    prompts = read_record(folder.prompts_file, PromptSets)
    model = model_folder(record, settings, events)
    with Workbench.prepared(folder, record, settings, model, prompts, events) as bench:
        yield bench


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
    """Deliver a trial of a job, exporting it first where that has not been done.

    Args:
        start: The job, from `resumption`, with the targets.
        number: The trial; None for the one that the job would choose.
        form: What is delivered; None for the job's format.
        events: Where progress goes.
        signals: What stops it.

    Returns:
        Targets that could not be delivered to, with the reason.

    Raises:
        GateError: The export misses one of the job's gates.
        UsageError: There is no such trial, or no target.
    """
    if not start.settings.upload:
        raise UsageError("there is no target to deliver to", remedy="give --upload")
    folder = start.folder
    with held(folder, start.identity, start.settings, events, signals) as hold:
        record, settings = start.opened()
        export = _exported(folder, record, settings, number, form, events)
        missed = missed_gate(settings, read_record(folder.figures_file(export.name), Figures))
        if missed is not None:
            raise GateError(missed, remedy="choose another trial, or run the job again with another gate")
        events.log_to(folder.events_file)
        with hold.outward():
            return deliver_to_all(folder, export, settings, events)


def apply(model: str, file: Path, out: Path, events: Events) -> None:
    """Apply a saved edit to a base model; a model on the Hub is fetched.

    Args:
        model: Folder, or NAME[@REVISION] on the Hub.
        file: The edit file, or the export that holds it.
        out: Folder of the edited model, new or empty.
        events: Where progress goes.
    """
    from job.export.directions_file import apply_edit

    source = parse_model(model)
    listing = list_model(source, None, events.say)
    quantisation_in(fetch_model(source, listing, events.say, weights=False))  # refused before the weights are fetched
    folder = fetch_model(source, listing, events.say)
    with events.progress("shards", len(list(folder.glob(f"*{WEIGHTS}")))) as advance:
        apply_edit(folder, file, out, advance)
