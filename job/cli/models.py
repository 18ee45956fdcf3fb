"""`abliterate inspect`, `demo-model`, `real-model` and `demo`."""

from __future__ import annotations

import os
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
from job.cli.outcome import print_outcome
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
    as_json: AsJson = False,
) -> None:
    """Train the built-in model organism and write it together with its prompt files."""
    from job.realmodel.folder import run_command

    with json_alone(as_json):
        from job.errors import UsageError
        from job.organism.folder import write_organism

        place = Path(os.path.realpath(folder))  # the finished folder is renamed there
        if place.exists() and not place.is_dir():
            raise UsageError(f"{place} is not a folder", remedy="name a new or empty folder")
        write_organism(place, arch=arch, size=size, seed=seed, report=_log)
    if as_json:
        _print_folder(folder)
        return
    typer.echo(folder)
    typer.echo(f"next: {run_command(folder)}", err=True)


@app.command("real-model", epilog=examples("real-model"))
def real_model(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="New or empty folder.")], as_json: AsJson = False
) -> None:
    """Write a small real chat model with its prompt files, and print the command that edits it.

    The model, SmolLM2-135M-Instruct, comes with the extra `real`; nothing is downloaded here.
    """
    from job.realmodel.folder import run_command, write_real_model

    with json_alone(as_json):
        write_real_model(folder, _log)
    if as_json:
        _print_folder(folder)
        return
    typer.echo(run_command(folder))


def _log(line: str) -> None:
    typer.echo(line, err=True)


def _print_folder(folder: Path) -> None:
    """Print a folder with a model, and the words of the command that edits it, as JSON."""
    from job.realmodel.folder import run_words

    typer.echo(redacted_json({"path": str(folder), "command": run_words(folder)}, indent=2))


@app.command(epilog=examples("demo"))
def demo(workspace: Workspace = None, trials: Trials = None, as_json: AsJson = False) -> None:
    """Run the whole job on the built-in model organism."""
    outcomes: list[Outcome] = []

    def run_it(settings: Settings, *, new: bool) -> Outcome:
        outcome = run_settings(settings, new=new)
        outcomes.append(outcome)
        return outcome if as_json else print_outcome(outcome)

    with json_alone(as_json):
        from job.organism.demo import run_demo

        run_demo(workspace, trials, run_it, _log)
    if as_json:
        print_outcome(outcomes[0], as_json)
        return
    typer.echo(f"open this in a browser: {outcomes[0].folder.page_file}")
