"""`abliterate status`, `front` and `report`: a job's progress and results."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from job.cli.app import app
from job.cli.help import examples, parsed
from job.cli.options import (
    AsJson,
    Checkpoint,
    Extensions,
    Job,
    Workspace,
    emphasised,
    find_job,
    where_is,
)
from job.text.behaviour import words_in
from job.text.redaction import redacted_json


@app.command(epilog=examples("status"))
def status(
    workspace: Workspace = None,
    job: Job = None,
    checkpoint: Checkpoint = None,
    assignments: Extensions = None,
    as_json: AsJson = False,
    watch: Annotated[
        bool, typer.Option("--watch", help="Update the output until the job has finished or failed.")
    ] = False,
    interval: Annotated[
        float | None,
        typer.Option(
            "--interval",
            "--every",
            metavar="SECONDS",
            parser=parsed("s", 0.1),
            help="Time between two updates with --watch; by default 2, at a checkpoint 30.",
        ),
    ] = None,
) -> None:
    """Show where a job stands, from its run folder or its checkpoint."""
    import shutil

    from job.cli.watch import HERE_SECONDS, THERE_SECONDS, follow
    from job.lifecycle.locate import status_folder
    from job.report.status import job_status, status_text

    where = where_is(workspace, job, checkpoint, assignments)

    def read() -> dict[str, Any]:
        with status_folder(where) as (folder, running):
            return job_status(folder, running)

    if watch:
        try:
            follow(read, interval or (THERE_SECONDS if checkpoint else HERE_SECONDS), as_json=as_json)
        except KeyboardInterrupt:
            raise typer.Exit(130) from None
        return
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    typer.echo(redacted_json(read(), indent=2) if as_json else status_text(read(), width))


@app.command(epilog=examples("front"))
def front(workspace: Workspace = None, job: Job = None, as_json: AsJson = False) -> None:
    """List the Pareto front of a job's trials, fewest refusals first, with intervals and exports."""
    import shutil

    from job.report.front import front_lines, front_text, job_front
    from job.report.tables import folded

    folder = find_job(workspace, job)
    found, words = job_front(folder), words_in(folder.read_job().settings)
    if as_json or not found:
        typer.echo(redacted_json(found, indent=2) if as_json else front_text(found, words))
        return
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    for point, line in zip(found, front_lines(found, words), strict=True):
        text = "\n".join(folded(line, width)) if width else line
        typer.echo(emphasised(text) if point["chosen"] else text)


@app.command(epilog=examples("report"))
def report(
    workspace: Workspace = None,
    job: Job = None,
    include_responses: Annotated[
        bool,
        typer.Option(
            "--include-responses",
            help="Also write a private page with the responses to bad prompts.",
        ),
    ] = False,
    picture: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Also draw the result as a PNG of 1200 × 630 pixels, to share."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write report.md and report.html of a job from its run folder, and print report.md."""
    from job.report.markdown import write_reports

    folder = find_job(workspace, job)
    text = write_reports(folder, include_responses=include_responses)
    if picture is not None:
        from job.report.picture import write_picture

        write_picture(folder, picture)
    if as_json:
        pages = {"report": folder.report_file, "page": folder.page_file}
        pages |= {"answers": folder.answers_page_file} if include_responses else {}
        pages |= {"picture": picture} if picture is not None else {}
        typer.echo(redacted_json({name: str(path) for name, path in pages.items()}, indent=2))
        return
    typer.echo(text)
    typer.echo(f"page with charts: {folder.page_file}", err=True)
    if include_responses:
        typer.echo(f"page with all responses: {folder.answers_page_file}", err=True)
