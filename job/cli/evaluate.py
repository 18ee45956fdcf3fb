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


# Long: half of it are options.
@app.command(epilog=examples("evaluate"))
def evaluate(
    models: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[MODEL]...", help="Folders, or NAME[@REVISION] on the Hub; without any, the job's model."
        ),
    ] = None,
    against: Annotated[
        str | None, typer.Option(metavar="BASE", help="Base model of all MODELs: folder or Hub name.")
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
    """Measure edited models against their base model: a job's trial, or MODEL... --against BASE.

    First a scorecard: answered, evaded, refused and broken, and the KL divergence. Then cross-entropy on plain text
    and benchmarks, with 95 % intervals. Several edits come in one table, and the base model is measured once. By
    default prompts are those that the job reports its figures on, or that a job would. What is found of a trial is
    also written to the run folder.
    """
    from job.system.signals import StopSignals

    if bool(models) != (against is not None) or (models and (trial is not None or job is not None)):
        raise UsageError("give MODEL --against BASE, or neither for a job's trial", remedy="see --help")
    if not models and (profile or config or assignments):
        raise UsageError(
            "--profile, --config and --set are for MODEL --against BASE",
            remedy="leave them out: a job has its own settings",
        )
    with StopSignals().installed(), json_alone(as_json):
        from job.evaluate.compare import ComparisonRequest, evaluate_models, evaluate_trial
        from job.evaluate.result import Comparison, comparison_text
        from job.evaluate.several import Comparisons, comparisons_text
        from job.storage.events import Events

        names = tuple(filter(None, (tasks or "").split(",")))
        asked = ComparisonRequest(good_prompts, bad_prompts, text, names, limit, tasks_folder)
        found: Comparison | Comparisons
        if models and against is not None:
            from job.config.load import load_settings

            options = {"model": models[0], **({"loading.device": device} if device else {})}
            loaded = load_settings(options, profile=profile, config=config, assignments=assignments or [])
            several = evaluate_models(models, against, loaded.settings, asked, Events())
            found = several[0] if len(several) == 1 else Comparisons(against=against, comparisons=tuple(several))
        else:
            found = evaluate_trial(find_job(workspace, job), trial, asked, Events(), device)
    if out is not None:
        from job.storage.atomic import write_record

        write_record(out, found)
    if as_json:
        typer.echo(found.model_dump_json(indent=2))
    else:
        typer.echo(comparisons_text(found) if isinstance(found, Comparisons) else comparison_text(found))
