"""`abliterate chat`."""

from __future__ import annotations

from typing import Annotated

import typer

from job.cli.app import app
from job.cli.help import examples
from job.cli.options import (
    Device,
    Job,
    TrialNumber,
    Workspace,
    find_job,
)


@app.command(epilog=examples("chat"))
def chat(
    workspace: Workspace = None,
    job: Job = None,
    trial: TrialNumber = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TEXT", help="Line to read instead of standard input, a message or a command; repeatable."
        ),
    ] = None,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="System prompt of the conversation.")] = None,
    tokens: Annotated[int, typer.Option(metavar="N", min=1, help="Longest response, in tokens.")] = 512,
    temperature: Annotated[float, typer.Option(metavar="T", min=0, help="Sampling temperature; 0: greedy.")] = 0.0,
    device: Device = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print each response as one line of JSON.")] = False,
) -> None:
    """Talk with a job's model under a trial's edit; /base and /trial N switch at once, /help lists the commands.

    The model is loaded once and the job is left alone. Every line is a turn of one conversation. Only answers go to
    standard output, so that lines may also come from a file.
    """
    from job.cli.chat import ChatOptions
    from job.cli.chat import chat as hold
    from job.storage.events import Events

    options = ChatOptions(tokens=tokens, temperature=temperature, system=system, as_json=as_json, device=device)
    hold(find_job(workspace, job), trial, options, prompt or None, Events())
