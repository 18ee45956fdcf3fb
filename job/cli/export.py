"""`abliterate export`, `upload` and `apply`: edits written and delivered after a search."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from job.cli.app import app
from job.cli.help import examples
from job.cli.options import (
    AsJson,
    Checkpoint,
    Extensions,
    Format,
    Job,
    Targets,
    TrialNumber,
    Workspace,
    export_format,
    find_job,
    json_alone,
    where_is,
)
from job.cli.outcome import print_json, tell_failed
from job.errors import GateError
from job.text.redaction import redacted_json


@app.command(epilog=examples("export"))
def export(
    workspace: Workspace = None,
    job: Job = None,
    trial: TrialNumber = None,
    form: Format = None,
    as_json: AsJson = False,
) -> None:
    """Export a trial of a job, by default the chosen one; earlier exports stay."""
    from job.system.signals import StopSignals

    with StopSignals().installed(), json_alone(as_json):
        from job.stages.followups import export_trial
        from job.storage.events import Events

        made = export_trial(find_job(workspace, job), trial, export_format(form), Events())
    _tell_path(made, as_json)


@app.command(epilog=examples("upload"))
def upload(
    workspace: Workspace = None,
    job: Job = None,
    checkpoint: Checkpoint = None,
    trial: TrialNumber = None,
    form: Format = None,
    upload: Targets = None,
    assignments: Extensions = None,
    as_json: AsJson = False,
) -> None:
    """Deliver a trial, by default the chosen one, to the job's targets; export it first if needed."""
    from job.system.signals import StopSignals

    signals = StopSignals()
    with signals.installed(), json_alone(as_json):
        from job.lifecycle.resumption import resumption
        from job.stages.followups import upload_trial
        from job.storage.events import Events

        where = where_is(workspace, job, checkpoint, assignments)
        events = Events()
        start = resumption(where, None, events.say, **({"upload": upload} if upload else {}))
        missed: GateError | None = None
        try:
            failed = upload_trial(start, trial, export_format(form), events, signals)
        except GateError as error:
            failed, missed = [], error
    if as_json:
        print_json(start.folder, failed, missed.line if missed else None)
    if missed is not None:
        raise missed
    tell_failed(start.folder, failed)


@app.command(epilog=examples("apply"))
def apply(
    model: Annotated[str, typer.Argument(help="The base model: a folder, or NAME[@REVISION] on the Hub.")],
    file: Annotated[Path, typer.Argument(help="edit.safetensors of an export in the format directions.")],
    out: Annotated[Path, typer.Argument(help="Folder of the edited model, new or empty.")],
    as_json: AsJson = False,
) -> None:
    """Apply a saved edit to its base model and write the edited model."""
    from job.system.signals import StopSignals

    with StopSignals().installed(), json_alone(as_json):
        from job.stages.followups import apply as apply_to
        from job.storage.events import Events

        apply_to(model, file, out, Events())
    _tell_path(out, as_json)


def _tell_path(path: Path, as_json: bool) -> None:
    typer.echo(redacted_json({"path": str(path)}) if as_json else path)
