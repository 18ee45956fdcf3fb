"""`abliterate inspect`, `demo-model`, `real-model` and `demo`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from job.cli.app import app
from job.cli.help import examples
from job.cli.options import (
    AsJson,
    Trials,
    Workspace,
    json_alone,
)
from job.cli.run import run_settings
from job.text.redaction import redacted_json

if TYPE_CHECKING:
    from job.config.schema import Settings
    from job.lifecycle.outcome import Outcome


@app.command("inspect", epilog=examples("inspect"))
def inspect_(
    model: Annotated[str, typer.Argument(help="Folder, or NAME[@REVISION] on the Hub; no weights are read.")],
    as_json: AsJson = False,
    trusted: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run the Python code that comes with the model.")
    ] = False,
) -> None:
    """List a model's residual writers, or say why it is not supported (exit code 3)."""
    from job.proof.truth_test import inspection_of
    from job.report.tables import aligned
    from job.storage.events import Events

    with json_alone(as_json):
        found = inspection_of(model, trusted, Events().say)
    if as_json:
        typer.echo(redacted_json(found, indent=2))
    elif found["supported"]:
        typer.echo(f"{found['model_type']}: supported, {found['layers']} layers")
        heads = [["layer", "component", "parameter", "norms before the stream"]]
        rows = [
            [str(writer["layer"]), writer["component"], writer["parameter"], ", ".join(writer["post_norm"])]
            for writer in found["writers"]
        ]
        for line in aligned(heads + rows if any(row[-1] for row in rows) else [row[:-1] for row in heads + rows]):
            typer.echo(f"  {line}".rstrip())
    else:
        typer.echo(f"{found['model_type']}: not supported: {found['reason']}")
    if not found["supported"]:
        raise typer.Exit(3)


@app.command("demo-model", epilog=examples("demo-model"))
def demo_model(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="New or empty folder.")],
    arch: Annotated[str, typer.Option(help="llama, qwen3, gemma2, mixtral or qwen3_moe.")] = "llama",
    size: Annotated[str, typer.Option(help="tiny or small.")] = "tiny",
    seed: Annotated[int, typer.Option(help="Seed of the training.")] = 0,
) -> None:
    """Train the built-in model organism and write it together with its prompt files."""
    from job.organism.folder import write_organism
    from job.realmodel.folder import run_command

    write_organism(folder, arch=arch, size=size, seed=seed, report=lambda line: typer.echo(line, err=True))
    typer.echo(folder)
    typer.echo(f"next: {run_command(folder)}", err=True)


@app.command("real-model", epilog=examples("real-model"))
def real_model(folder: Annotated[Path, typer.Argument(metavar="DIR", help="New or empty folder.")]) -> None:
    """Write a small real chat model with its prompt files, and print the command that edits it.

    The model, SmolLM2-135M-Instruct, comes with the extra `real`; nothing is downloaded here.
    """
    from job.realmodel.folder import run_command, write_real_model

    write_real_model(folder, lambda line: typer.echo(line, err=True))
    typer.echo(run_command(folder))


@app.command(epilog=examples("demo"))
def demo(workspace: Workspace = None, trials: Trials = None) -> None:
    """Run the whole job on the built-in model organism."""
    from job.organism.demo import run_demo

    outcomes: list[Outcome] = []

    def run_it(settings: Settings, *, new: bool) -> Outcome:
        outcomes.append(run_settings(settings, new=new))
        return outcomes[-1]

    run_demo(workspace, trials, run_it, lambda line: typer.echo(line, err=True))
    typer.echo(f"open this in a browser: {outcomes[0].folder.page_file}")
