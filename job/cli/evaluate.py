"""`abliterate evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

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
from job.errors import JobError, UsageError
from job.text.behaviour import words_in, words_of

if TYPE_CHECKING:
    from job.model.bnb import LoadIn

_Models = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[MODEL]...",
        help="Folders, GGUF files, or NAME[@REVISION] on the Hub; without any, the job's model.",
    ),
]
_Against = Annotated[str | None, typer.Option(metavar="BASE", help="Base model of all MODELs: folder or Hub name.")]
_Text = Annotated[
    str | None,
    typer.Option(
        metavar="SPEC",
        help="Plain text for the cross-entropy, or `none`; by default 100 texts of C4's validation split, 512 "
        "tokens of each, streamed from the Hub or, where it cannot be reached, the base model's own responses.",
    ),
]
_Tasks = Annotated[
    str | None,
    typer.Option(
        metavar="A,B",
        help="Benchmarks of lm-eval (an extra), by commas, or `quick`: 200 documents of each of five tasks. A trial's "
        "card and reports show the scores.",
    ),
]
_Limit = Annotated[int | None, typer.Option(metavar="N", min=1, help="How many documents of each benchmark to use.")]
_TasksFolder = Annotated[Path | None, typer.Option(metavar="DIR", help="Folder of your own benchmark definitions.")]
_LoadInKind = Annotated[
    str | None,
    typer.Option(metavar="KIND", help="Quantise MODEL while it is loaded: bnb-4bit or bnb-8bit (an extra)."),
]
_Gate = Annotated[
    bool, typer.Option("--gate", help="Fail with exit code 5 if the model misses a bound; a job has its own bounds.")
]
_MaxKL = Annotated[float | None, typer.Option(metavar="X", min=0, help="Highest KL divergence; implies --gate.")]
_MaxRefusals = Annotated[
    int | None, typer.Option(metavar="N", min=0, help="Most refusals and broken responses; implies --gate.")
]
_Upload = Annotated[
    list[str] | None,
    typer.Option(
        metavar="URI",
        help="Deliver MODEL's files with the figures, unless it misses a bound: file:///dir, hf://user/repo, "
        "s3://bucket/prefix; repeatable.",
    ),
]
_Out = Annotated[Path | None, typer.Option(metavar="FILE", help="Write the measurements to this file as JSON.")]


# Long: most of it are options.
@app.command(epilog=examples("evaluate"))
def evaluate(
    models: _Models = None,
    against: _Against = None,
    workspace: Workspace = None,
    job: Job = None,
    trial: TrialNumber = None,
    good_prompts: Prompts = None,
    bad_prompts: Prompts = None,
    text: _Text = None,
    tasks: _Tasks = None,
    limit: _Limit = None,
    tasks_folder: _TasksFolder = None,
    load_in: _LoadInKind = None,
    gate: _Gate = False,
    max_kl: _MaxKL = None,
    max_refusals: _MaxRefusals = None,
    upload: _Upload = None,
    profile: Profile = None,
    config: Config = None,
    assignments: Assignments = None,
    device: Device = None,
    out: _Out = None,
    as_json: AsJson = False,
) -> None:
    """Measure edited models against their base model: a job's trial, or MODEL... --against BASE.

    First a scorecard: answered, evaded, refused and broken, and the KL divergence. Then cross-entropy on plain text
    and benchmarks, with 95 % intervals. Several edits come in one table, and the base model is measured once. By
    default prompts are those that the job reports its figures on, or that a job would. What is found of a trial is
    also written to the run folder. MODEL may be quantised: GGUF, FP8 and whatever else transformers reads.
    """
    from job.system.signals import StopSignals

    if bool(models) != (against is not None) or (models and (trial is not None or job is not None)):
        raise UsageError("give MODEL --against BASE, or neither for a job's trial", remedy="see --help")
    _require_models(
        models or [], {"profile": profile, "config": config, "set": assignments, "load-in": load_in, "upload": upload}
    )
    gated = gate or max_kl is not None or max_refusals is not None
    with StopSignals().installed():
        from job.evaluate.compare import ComparisonRequest, MeasuredPair, evaluate_models, evaluate_trial
        from job.evaluate.delivery import deliver_measured, require_deliverable
        from job.evaluate.gate import require_gate, with_bounds
        from job.evaluate.result import comparison_text
        from job.evaluate.several import Comparisons, comparisons_text
        from job.storage.events import Events
        from job.storage.jobs import job_settings

        names, events, measured = tuple(filter(None, (tasks or "").split(","))), Events(), list[MeasuredPair]()
        failed: JobError | None = None
        asked = ComparisonRequest(good_prompts, bad_prompts, text, names, limit, tasks_folder, _kind(load_in))
        with json_alone(as_json):
            if models and against is not None:
                from job.config.load import load_settings

                options = {"model": models[0], "upload": upload or [], **({"loading.device": device} if device else {})}
                loaded = load_settings(options, profile=profile, config=config, assignments=assignments or [])
                settings = with_bounds(loaded.settings, max_kl, max_refusals) if gated else loaded.settings
                words = words_of(settings.card.behaviour)
                if upload:
                    require_deliverable(models)
                measured, failed = evaluate_models(models, against, settings, asked, events)
                found = [one.comparison for one in measured]
            else:
                folder = find_job(workspace, job)
                settings = with_bounds(job_settings(folder), max_kl, max_refusals) if gated else job_settings(folder)
                words = words_in(folder.read_job().settings)
                found = [evaluate_trial(folder, trial, asked, events, device)]
        together = Comparisons(against=against or "", comparisons=tuple(found)) if len(found) > 1 else None
        if out is not None:
            from job.storage.atomic import write_record

            write_record(out, together or found[0])
        if as_json:
            typer.echo((together or found[0]).model_dump_json(indent=2))
        else:
            typer.echo(comparisons_text(together, words) if together else comparison_text(found[0], words))
        if gated or upload:
            require_gate(settings, found)
        if failed is not None:
            raise failed
        if upload:
            deliver_measured(measured[0], settings, events)


def _require_models(models: list[str], given: dict[str, object]) -> None:
    """Raise UsageError for options of MODEL --against BASE where a job's trial is measured."""
    names = [name for name, value in given.items() if value]
    if not models and names:
        raise UsageError(
            f"--{names[0]} is for MODEL --against BASE",
            remedy="leave it out: a job has its own settings, and `abliterate upload` delivers its trials",
        )


def _kind(load_in: str | None) -> LoadIn | None:
    """Return a kind of quantisation by its name. Raises UsageError."""
    from job.model.bnb import LOAD_IN

    for kind in LOAD_IN:
        if kind == load_in:
            return kind
    if load_in is not None:
        raise UsageError(f"--load-in knows no {load_in}", remedy=f"choose from: {', '.join(LOAD_IN)}")
    return None
