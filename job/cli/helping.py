"""`abliterate worker`."""

from __future__ import annotations

from typing import Annotated

import typer

from job.cli.app import app
from job.cli.options import (
    Checkpoint,
    Extensions,
    Job,
    Workspace,
    where_is,
)


@app.command()
def worker(
    workspace: Workspace = None,
    job: Job = None,
    checkpoint: Checkpoint = None,
    workers: Annotated[int | None, typer.Option(metavar="N", help="Processes; unset: one for every GPU.")] = None,
    wait: Annotated[float, typer.Option(metavar="MIN", help="Minutes without a sign of life of the job.")] = 60.0,
    assignments: Extensions = None,
) -> None:
    """Help a running job that has a database, from another machine or GPU, until its search is done."""
    from job.cli.worker import help_job
    from job.storage.events import Events

    help_job(where_is(workspace, job, checkpoint, assignments), workers, wait, Events())
