"""`abliterate evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from job.cli.app import app
from job.cli.help import examples
from job.cli.options import (
    AsJson,
    Assignments,
    Config,
    Device,
    Job,
    Profile,
    Prompts,
    TrialNumber,
    Workspace,
    find_job,
    json_alone,
)
from job.errors import UsageError
from job.text.behaviour import words_in, words_of


# Long: half of it are options.
@app.command(epilog=examples("evaluate"))
def evaluate(
    model: Annotated[
        str | None, typer.Argument(help="Folder, or NAME[@REVISION] on the Hub; without it, the job's model.")
    ] = None,
    against: Annotated[
        str | None, typer.Option(metavar="BASE", help="Base model of MODEL: folder or Hub name.")
    ] = None,
    workspace: Workspace = None,
    job: Job = None,
    trial: TrialNumber = None,
    good_prompts: Prompts = None,
    bad_prompts: Prompts = None,
    text: Annotated[
        str | None,
        typer.Option(
            metavar="SPEC",
            help="Plain text for the cross-entropy, or `none`; by default 100 texts of C4's validation split, 512 "
            "tokens of each, streamed from the Hub or, where it cannot be reached, the base model's own responses.",
        ),
    ] = None,
    tasks: Annotated[
        str | None, typer.Option(metavar="A,B", help="Benchmarks of lm-eval (an extra), by commas.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="How many documents of each benchmark to use.")
    ] = None,
    tasks_folder: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder of your own benchmark definitions.")
    ] = None,
    profile: Profile = None,
    config: Config = None,
    assignments: Assignments = None,
    device: Device = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the measurements to this file as JSON.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Measure an edited model against its base model: a job's trial, or MODEL --against BASE.

    Refusals, false refusals, broken answers, KL divergence, cross-entropy on plain text and benchmarks, with 95 %
    intervals. By default prompts are those that the job reports its figures on, or that a job would. What is found of a
    trial is also written to the run folder.
    """
    from job.system.signals import StopSignals

    if (model is None) != (against is None) or (model is not None and (trial is not None or job is not None)):
        raise UsageError("give MODEL --against BASE, or neither for a job's trial", remedy="see --help")
    if model is None and (profile or config or assignments):
        raise UsageError(
            "--profile, --config and --set are for MODEL --against BASE",
            remedy="leave them out: a job has its own settings",
        )
    with StopSignals().installed(), json_alone(as_json):
        from job.evaluate.compare import ComparisonRequest, evaluate_models, evaluate_trial
        from job.evaluate.result import comparison_text
        from job.storage.events import Events

        names = tuple(filter(None, (tasks or "").split(",")))
        asked = ComparisonRequest(good_prompts, bad_prompts, text, names, limit, tasks_folder)
        if model is not None and against is not None:
            from job.config.load import load_settings

            options = {"model": model, **({"loading.device": device} if device else {})}
            loaded = load_settings(options, profile=profile, config=config, assignments=assignments or [])
            words = words_of(loaded.settings.card.behaviour)
            found = evaluate_models(model, against, loaded.settings, asked, Events())
        else:
            folder = find_job(workspace, job)
            words = words_in(folder.read_job().settings)
            found = evaluate_trial(folder, trial, asked, Events(), device)
    if out is not None:
        from job.storage.atomic import write_record

        write_record(out, found)
    typer.echo(found.model_dump_json(indent=2) if as_json else comparison_text(found, words))
