"""What is done with a job's run folder after its search: other points of the front, later deliveries."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from job.errors import GateError, UsageError
from job.events import Events
from job.models import WEIGHTS, fetch_model, list_model, parse_model
from job.pipeline import missed_gate, model_folder
from job.prompts import PromptSets
from job.records import ExportFormat, Figures, JobRecord, Trial
from job.result import job_trials
from job.search import choose
from job.settings import Settings
from job.upload.targets import deliver_to_all
from job.workspace import RunFolder, is_sealed, model_identity, read_record

if TYPE_CHECKING:
    from job.workbench import Workbench


def job_settings(folder: RunFolder, **others: object) -> Settings:
    """Return the settings of a job as of its latest start, with others in their place."""
    return Settings(**{**folder.read_job().settings, "workspace": str(folder.path.parent), **others})


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
    record, settings = folder.read_job(), job_settings(folder)
    trials = job_trials(folder)
    trial = _trial(folder, record, settings, trials, number)
    form = form or settings.export_format
    export = folder.export_folder(trial.number, form)
    with folder.held():
        if not is_sealed(export):
            _export(folder, record, settings, lambda bench: bench.export(trial, len(trials), form), events)
    return export


def _trial(
    folder: RunFolder, record: JobRecord, settings: Settings, trials: Sequence[Trial], number: int | None
) -> Trial:
    """Return the trial of a number, or the one that the job would choose."""
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
    if model_identity(settings) != record.identity["model"]:
        raise UsageError(
            f"the model of job {record.job_id} is no longer what it was",
            remedy="restore it where job.json says it was",
        )
    from job.workbench import Workbench

    events.log_to(folder.events_file)
    prompts = read_record(folder.prompts_file, PromptSets)
    model = model_folder(record, settings, events)
    with Workbench.prepared(folder, record, settings, model, prompts, events) as bench:
        export(bench)


def upload_trial(
    folder: RunFolder, number: int | None, form: ExportFormat | None, settings: Settings, events: Events
) -> list[tuple[str, str]]:
    """Deliver a trial of a job, exporting it first where that has not been done.

    Args:
        folder: The run folder.
        number: The trial; None for the one that the job would choose.
        form: What is delivered; None for the job's format.
        settings: The job's settings, with the targets.
        events: Where progress goes.

    Returns:
        Targets that could not be delivered to, with the reason.

    Raises:
        GateError: The export misses one of the job's gates.
        UsageError: There is no such trial, or no target.
    """
    if not settings.upload:
        raise UsageError("there is no target to deliver to", remedy="give --upload")
    export = export_trial(folder, number, form, events)
    missed = missed_gate(settings, read_record(folder.figures_file(export.name), Figures))
    if missed is not None:
        raise GateError(missed, remedy="choose another trial, or run the job again with another gate")
    with folder.held():
        events.log_to(folder.events_file)
        return deliver_to_all(folder, export, settings, events)


def apply(model: str, file: Path, out: Path, events: Events) -> None:
    """Apply a saved edit to a base model; a model on the Hub is fetched.

    Args:
        model: Folder, or NAME[@REVISION] on the Hub.
        file: The edit file, or the export that holds it.
        out: Folder of the edited model, new or empty.
        events: Where progress goes.
    """
    from job.edit_file import apply_edit

    source = parse_model(model)
    folder = fetch_model(source, list_model(source, None, events.say), events.say)
    with events.progress("shards", len(list(folder.glob(f"*{WEIGHTS}")))) as advance:
        apply_edit(folder, file, out, advance)
