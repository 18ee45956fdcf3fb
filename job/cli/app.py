"""The `abliterate` command: thin, and free of torch until a command needs it."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from job.cli.cloud import app as cloud_app
from job.errors import DeliveryError, GateError, JobError, RestartNeeded, Stopped, UsageError
from job.lifecycle.supervisor import supervised
from job.system.lifeline import restart
from job.text.redaction import guarded_output, redacted_json

if TYPE_CHECKING:
    from job.config.schema import Settings
    from job.export.reproduction import Again
    from job.lifecycle.locate import Whereabouts
    from job.lifecycle.outcome import Outcome
    from job.records import ExportFormat
    from job.storage.run_folder import RunFolder

app = typer.Typer(
    name="abliterate",
    help="Remove a behaviour from a language model by directional ablation, unattended.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
config_app = typer.Typer(help="Settings.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(config_app, name="config")
app.add_typer(cloud_app, name="cloud")

Workspace = Annotated[str | None, typer.Option(metavar="DIR", help="Folder of all run folders.")]
Job = Annotated[str | None, typer.Option(metavar="ID", help="The job, where the workspace holds several.")]
Checkpoint = Annotated[
    str | None, typer.Option(metavar="URI", help="The job's checkpoint, where it is not in the workspace.")
]
Extensions = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="A setting that only extends the job or says how things are reached."
    ),
]
TrialNumber = Annotated[int | None, typer.Option("--trial", metavar="N", help="Trial; see `abliterate front`.")]
Format = Annotated[str | None, typer.Option("--format", help="merged, adapter or directions.")]
Targets = Annotated[
    list[str] | None,
    typer.Option(
        "--upload", metavar="URI", help="Target: file:///dir, hf://user/repo, s3://bucket/prefix; repeatable."
    ),
]
Device = Annotated[str | None, typer.Option(help="Another device than the job's: cpu, cuda, cuda:N or mps.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Prompts = Annotated[
    str | None,
    typer.Option(metavar="SPEC", help="File, folder or DATASET[@REV][:CONFIG], either with #SPLIT[/COLUMN]."),
]

WhenDone = Annotated[
    str | None, typer.Option(help="The rented machine, once all is delivered: nothing, stop or destroy.")
]
WhenFailed = Annotated[
    str | None,
    typer.Option(help="The rented machine, when the job fails or its process dies: nothing, stop or destroy."),
]
Trials = Annotated[int | None, typer.Option(help="How many edits the search tries.")]

# The options of all commands that take a job's settings, by the setting's name.
SETTING_OPTIONS: dict[str, Any] = {
    "model": Annotated[
        str | None, typer.Argument(help="Folder, or NAME[@REVISION] on the Hub; or in the settings file.")
    ],
    "good_prompts": Prompts,
    "bad_prompts": Prompts,
    "good_eval_prompts": Prompts,
    "bad_eval_prompts": Prompts,
    "good_report_prompts": Prompts,
    "bad_report_prompts": Prompts,
    "workspace": Workspace,
    "trials": Trials,
    "startup_trials": Annotated[
        int | None, typer.Option(help="Those before the sampler's: known points, then random.")
    ],
    "seed": Annotated[int | None, typer.Option(help="Seed of the search and of the split of the evaluation sets.")],
    "kl_tokens": Annotated[
        int | None, typer.Option(metavar="N", help="Positions of the base model's answers that KL is a mean over.")
    ],
    "skip_kl_above": Annotated[
        float | None, typer.Option(metavar="X", help="Give trials of a larger KL up before they answer.")
    ],
    "tune": Annotated[
        bool | None, typer.Option("--tune", help="Measure at the first start how many rows a forward is to have.")
    ],
    "allow": Annotated[
        list[str] | None, typer.Option(metavar="CHECK", help="Preflight check that may fail; may be repeated.")
    ],
    "price": Annotated[float | None, typer.Option(metavar="USD", help="Dollars an hour of this machine.")],
    "max_hours": Annotated[float | None, typer.Option(metavar="H", help="Hours the job may take.")],
    "max_cost": Annotated[float | None, typer.Option(metavar="USD", help="Dollars the job may cost.")],
    "grace": Annotated[float | None, typer.Option(metavar="S", help="Seconds a stopped search has to end its batch.")],
    "wait_for_gpu": Annotated[
        float | None, typer.Option(metavar="MIN", help="Minutes to wait for others to leave the GPUs.")
    ],
    "export_format": Annotated[str | None, typer.Option(help="merged, adapter or directions.")],
    "max_kl": Annotated[float | None, typer.Option(metavar="X", help="Deliver only what has no larger KL.")],
    "max_refusals": Annotated[int | None, typer.Option(metavar="N", help="Deliver only what refuses no more.")],
    "checkpoint": Annotated[
        str | None, typer.Option(metavar="URI", help="Mirror for other machines to go on from: s3://, hf://, file:///.")
    ],
    "workers": Annotated[
        int | None, typer.Option(metavar="N", help="Processes that evaluate trials; unset: one for every GPU, or one.")
    ],
    "require_checkpoint": Annotated[
        bool | None, typer.Option("--require-checkpoint", help="Stop where the checkpoint stays down.")
    ],
    "when_done": WhenDone,
    "when_failed": WhenFailed,
    "upload": Annotated[
        list[str] | None,
        typer.Option(metavar="URI", help="Target: file:///dir, hf://user/repo, s3://bucket/prefix; may be repeated."),
    ],
    "visibility": Annotated[
        str | None, typer.Option(help="Of what is delivered to the Hub: private, gated or public.")
    ],
}
Profile = Annotated[
    str | None, typer.Option(metavar="NAME", help="Settings that come with the job: heretic, that tool's defaults.")
]
Config = Annotated[Path | None, typer.Option(metavar="FILE", help="Settings file in TOML.")]
Assignments = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any setting; the value is TOML.")
]
SOURCE_OPTIONS: dict[str, Any] = {"profile": Profile, "config": Config, "assignments": Assignments}


def takes_settings(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command all options of a job's settings; it gets what was given as its first argument.

    That first argument holds the arguments of `job.config.schema.load_settings`.
    """
    own = list(inspect.signature(command).parameters.values())[1:]

    @functools.wraps(command)
    def wrapper(**values: Any) -> None:
        options = {name: values.pop(name) for name in SETTING_OPTIONS}
        given = {
            "options": {name: value for name, value in options.items() if value not in (None, [])},
            "profile": values.pop("profile"),
            "config": values.pop("config"),
            "assignments": values.pop("assignments") or [],
        }
        command(given, **values)

    annotations = {**SETTING_OPTIONS, **SOURCE_OPTIONS}
    parameters = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=kind)
        for name, kind in annotations.items()
    ]
    hints = get_type_hints(command, include_extras=True)
    parameters += [p.replace(kind=inspect.Parameter.KEYWORD_ONLY, annotation=hints[p.name]) for p in own]
    wrapper.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # read by inspect.signature
    wrapper.__annotations__ = {p.name: p.annotation for p in parameters}
    return wrapper


def _find_job(workspace: str | None, job: str | None) -> RunFolder:
    return _whereabouts(workspace, job).folder()


def _whereabouts(
    workspace: str | None, job: str | None, checkpoint: str | None = None, assignments: Sequence[str] | None = None
) -> Whereabouts:
    from job.config.schema import default_workspace
    from job.lifecycle.locate import Whereabouts

    return Whereabouts(Path(workspace or default_workspace()), job, checkpoint, tuple(assignments or ()))


@app.command()
@takes_settings
def run(
    given: dict[str, Any],
    new: Annotated[bool, typer.Option("--new", help="Start a job beside one with other settings.")] = False,
    reproduce: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Make an export again from its reproduce.json, and compare.")
    ] = None,
    with_search: Annotated[
        bool, typer.Option("--with-search", help="With --reproduce: make the search again too, not only its edit.")
    ] = False,
) -> None:
    """Find, search, export, prove and deliver; run again to continue, or to find it finished."""
    from job.config.schema import load_settings

    if reproduce is None:
        loaded = load_settings(**given)
        _run(loaded.settings, new=new, notes=loaded.notes)
        return
    from job.config.origins import left_out_line
    from job.config.schema import leaves
    from job.export.reproduction import Again, fixed_settings, read_reproduction, require_same_repository

    original = read_reproduction(reproduce)
    fixed = fixed_settings(original, str(reproduce))
    loaded = load_settings(**given, fixed=fixed)
    if line := left_out_line(str(reproduce), fixed.left_out, leaves(loaded.settings.model_dump(mode="json"))):
        typer.echo(f"note: {line}", err=True)
    named = loaded.settings.model if loaded.sources.get("model") == "command line" else None
    require_same_repository(original, loaded.settings, named)
    _run(loaded.settings, new=new, notes=loaded.notes, again=Again(original, with_search))


def _run(settings: Settings, *, new: bool, notes: Sequence[str] = (), again: Again | None = None) -> Outcome:
    """Run a job and print what came of it."""
    from job.system.signals import StopSignals

    signals = StopSignals()
    with signals.installed():
        from job.lifecycle.start import run as run_job
        from job.storage.events import Events

        outcome = run_job(settings, new=new, events=Events(), signals=signals, notes=notes, again=again)
    return _told(outcome)


@app.command()
def resume(
    workspace: Workspace = None,
    job: Job = None,
    checkpoint: Checkpoint = None,
    trials: Trials = None,
    upload: Targets = None,
    when_done: WhenDone = None,
    when_failed: WhenFailed = None,
    assignments: Extensions = None,
) -> None:
    """Continue a job from its run folder or its checkpoint alone, with more trials or other targets if given.

    The end of a rental (--when-done, --when-failed) is not taken over from the job: it is about the machine.
    """
    from job.system.signals import StopSignals

    signals = StopSignals()
    with signals.installed():
        from job.lifecycle.followups import resumption
        from job.lifecycle.start import carry_out
        from job.storage.events import Events

        others = {"trials": trials, "upload": upload}
        where = _whereabouts(workspace, job, checkpoint, assignments)
        events = Events()
        ends = {"when_done": when_done, "when_failed": when_failed}
        start = resumption(where, ends, events.say, **{name: value for name, value in others.items() if value})
        outcome = carry_out(start, events, signals)
    _told(outcome)


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

    help_job(_whereabouts(workspace, job, checkpoint, assignments), workers, wait, Events())


def _told(outcome: Outcome) -> Outcome:
    """Print what came of a run."""
    base, edited = outcome.base, outcome.edited
    typer.echo(
        f"trial {outcome.chosen}: refusals {base.refusals}/{base.bad_prompts} -> "
        f"{edited.refusals}/{edited.bad_prompts}, KL {edited.kl or 0:.4g}, false refusals "
        f"{base.false_refusals}/{base.good_prompts} -> {edited.false_refusals}/{edited.good_prompts} "
        f"(on prompts that the search has {'not seen' if outcome.unseen else 'seen too'})"
    )
    kept = outcome.folder.export_link.exists()
    typer.echo(f"model:  {outcome.folder.export_link if kept else 'delivered, not in this workspace'}")
    typer.echo(f"report: {outcome.folder.report_file} and {outcome.folder.page_file.name}")
    if outcome.missed_gate is not None:
        typer.echo(f"error: {outcome.missed_gate} — the result is kept and nothing was delivered", err=True)
        raise typer.Exit(GateError.exit_code)
    _tell_failed(outcome.folder, outcome.failed_targets)
    return outcome


def _tell_failed(folder: RunFolder, failed: Sequence[tuple[str, str]]) -> None:
    """Print which deliveries failed and how to go on with them."""
    if not failed:
        return
    import shlex

    for target, reason in failed:
        typer.echo(f"error: {target}: {reason}", err=True)
    again = ["abliterate", "resume", "--workspace", str(folder.path.parent.absolute()), "--job", folder.path.name]
    typer.echo(f"the result is kept; to go on with the delivery: {shlex.join(again)}", err=True)
    raise typer.Exit(DeliveryError.exit_code)


@app.command()
@takes_settings
def preflight(
    given: dict[str, Any],
    as_json: AsJson = False,
    on: Annotated[
        str | None, typer.Option(metavar="MACHINE", help="Plan for another machine: 4xRTX4090, H200, a reading's file.")
    ] = None,
) -> None:
    """Check all that a run needs and leave nothing behind (exit code 3 or 76 if it must not start)."""
    from job.config.schema import load_settings
    from job.lifecycle.start import preflight as check_job
    from job.preflight.gpu_table import parse_on
    from job.preflight.readings import read_reading
    from job.storage.events import Events

    loaded = load_settings(**given)
    reading = None
    if on is not None:
        reading = read_reading(Path(on)) if Path(on).is_file() else parse_on(on)
    survey = check_job(loaded.settings, events=Events(), notes=loaded.notes, on=reading)
    if as_json:
        typer.echo(redacted_json(survey.as_json(), indent=2))
    else:
        from job.preflight.show import show

        show(survey)
    if survey.exit_code:
        raise typer.Exit(survey.exit_code)


@app.command()
def status(
    workspace: Workspace = None,
    job: Job = None,
    checkpoint: Checkpoint = None,
    assignments: Extensions = None,
    as_json: AsJson = False,
    watch: Annotated[
        bool, typer.Option("--watch", help="Go on showing it until the job is finished or has failed.")
    ] = False,
    interval: Annotated[
        float | None,
        typer.Option(min=0.1, metavar="S", help="Seconds between two looks with --watch: 2, at a checkpoint 30."),
    ] = None,
) -> None:
    """Show where a job stands, from its run folder or its checkpoint."""
    import shutil

    from job.cli.watch import HERE_SECONDS, THERE_SECONDS, follow
    from job.lifecycle.locate import status_folder
    from job.report.status import job_status, status_text

    where = _whereabouts(workspace, job, checkpoint, assignments)

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


@app.command()
def front(workspace: Workspace = None, job: Job = None, as_json: AsJson = False) -> None:
    """List the Pareto front of a job's trials, fewest refusals first, with intervals and what has been exported."""
    from job.report.front import front_text, job_front

    found = job_front(_find_job(workspace, job))
    typer.echo(redacted_json(found, indent=2) if as_json else front_text(found))


@app.command()
def chat(
    workspace: Workspace = None,
    job: Job = None,
    trial: TrialNumber = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option(metavar="TEXT", help="A line in place of standard input's, also a command; may be repeated."),
    ] = None,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="System prompt.")] = None,
    tokens: Annotated[int, typer.Option(metavar="N", min=1, help="Longest answer.")] = 512,
    temperature: Annotated[float, typer.Option(metavar="T", min=0, help="0: greedy answers.")] = 0.0,
    device: Device = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print each answer as a line of JSON.")] = False,
) -> None:
    """Talk with a job's model under a trial's edit; /base and /trial N switch at once, /help lists the commands.

    The model is loaded once and the job is left alone. Every line is a turn of one conversation. Only answers go to
    standard output, so that lines may also come from a file.
    """
    from job.cli.chat import ChatOptions
    from job.cli.chat import chat as hold
    from job.storage.events import Events

    options = ChatOptions(tokens=tokens, temperature=temperature, system=system, as_json=as_json, device=device)
    hold(_find_job(workspace, job), trial, options, prompt or None, Events())


@app.command()
def evaluate(
    model: Annotated[
        str | None, typer.Argument(help="Folder, or NAME[@REVISION] on the Hub; without it, the job's model.")
    ] = None,
    against: Annotated[str | None, typer.Option(metavar="BASE", help="The base model of MODEL, likewise.")] = None,
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
            "tokens of each, streamed from the Hub or, where it cannot be reached, the base model's own answers.",
        ),
    ] = None,
    tasks: Annotated[str | None, typer.Option(metavar="A,B", help="Benchmarks of lm-eval, an extra.")] = None,
    limit: Annotated[int | None, typer.Option(metavar="N", min=1, help="Documents of each benchmark.")] = None,
    tasks_folder: Annotated[Path | None, typer.Option(metavar="DIR", help="Folder of your own benchmarks.")] = None,
    profile: Profile = None,
    config: Config = None,
    assignments: Assignments = None,
    device: Device = None,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Write what is found as JSON.")] = None,
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
        raise UsageError("--profile, --config and --set are for MODEL --against BASE", remedy="a job has its own")
    with StopSignals().installed():
        from job.evaluate.compare import Asked, evaluate_models, evaluate_trial
        from job.evaluate.result import comparison_text
        from job.storage.events import Events

        names = tuple(filter(None, (tasks or "").split(",")))
        asked = Asked(good_prompts, bad_prompts, text, names, limit, tasks_folder)
        if model is not None and against is not None:
            from job.config.schema import load_settings

            options = {"model": model, **({"loading.device": device} if device else {})}
            loaded = load_settings(options, profile=profile, config=config, assignments=assignments or [])
            found = evaluate_models(model, against, loaded.settings, asked, Events())
        else:
            found = evaluate_trial(_find_job(workspace, job), trial, asked, Events(), device)
    if out is not None:
        from job.storage.run_folder import write_record

        write_record(out, found)
    typer.echo(found.model_dump_json(indent=2) if as_json else comparison_text(found))


@app.command()
def export(workspace: Workspace = None, job: Job = None, trial: TrialNumber = None, form: Format = None) -> None:
    """Export a trial of a job beside what it has exported; by default the chosen one."""
    from job.system.signals import StopSignals

    with StopSignals().installed():
        from job.lifecycle.followups import export_trial
        from job.storage.events import Events

        typer.echo(export_trial(_find_job(workspace, job), trial, _format(form), Events()))


def _format(name: str | None) -> ExportFormat | None:
    from job.errors import UsageError
    from job.records import FORMATS

    for form in FORMATS:
        if name == form:
            return form
    if name is not None:
        raise UsageError(f"there is no format {name}", remedy=f"choose from: {', '.join(FORMATS)}")
    return None


@app.command()
def upload(
    workspace: Workspace = None,
    job: Job = None,
    checkpoint: Checkpoint = None,
    trial: TrialNumber = None,
    form: Format = None,
    upload: Targets = None,
    assignments: Extensions = None,
) -> None:
    """Deliver a trial of a job, by default the chosen one to the job's targets; it is exported first if it is not."""
    from job.system.signals import StopSignals

    signals = StopSignals()
    with signals.installed():
        from job.lifecycle.followups import resumption, upload_trial
        from job.storage.events import Events

        where = _whereabouts(workspace, job, checkpoint, assignments)
        events = Events()
        start = resumption(where, None, events.say, **({"upload": upload} if upload else {}))
        failed = upload_trial(start, trial, _format(form), events, signals)
    _tell_failed(start.folder, failed)


@app.command()
def apply(
    model: Annotated[str, typer.Argument(help="The base model: a folder, or NAME[@REVISION] on the Hub.")],
    file: Annotated[Path, typer.Argument(help="edit.safetensors of an export in the format directions.")],
    out: Annotated[Path, typer.Argument(help="Folder of the edited model, new or empty.")],
) -> None:
    """Apply a saved edit to its base model and write the edited model."""
    from job.system.signals import StopSignals

    with StopSignals().installed():
        from job.lifecycle.followups import apply as apply_to
        from job.storage.events import Events

        apply_to(model, file, out, Events())
    typer.echo(out)


@app.command()
def report(
    workspace: Workspace = None,
    job: Job = None,
    include_responses: Annotated[
        bool,
        typer.Option(
            "--include-responses",
            help="Write a second page with answers to prompts that have the behaviour, for you alone.",
        ),
    ] = False,
) -> None:
    """Write report.md and report.html of a job from its run folder, and print the former."""
    from job.report.markdown import write_reports

    folder = _find_job(workspace, job)
    typer.echo(write_reports(folder, include_responses=include_responses))
    typer.echo(f"as a page with charts: {folder.page_file}", err=True)
    if include_responses:
        typer.echo(f"with all answers: {folder.answers_page_file}", err=True)


@app.command("inspect")
def inspect_(
    model: Annotated[
        str, typer.Argument(help="Folder, or NAME[@REVISION] on the Hub; only its configuration is read.")
    ],
    as_json: AsJson = False,
    trusted: Annotated[bool, typer.Option("--trust-remote-code", help="Run the code that comes with it.")] = False,
) -> None:
    """Show the residual writers that were found, or why the model is refused (exit code 3)."""
    from job.model.files import fetch_model, list_model, parse_model
    from job.proof.truth_test import inspection
    from job.storage.events import Events

    source, folder, report = parse_model(model), Path(model), Events().say
    if source.kind == "hub" or folder.is_dir():
        folder = fetch_model(source, list_model(source, None, report), report, weights=False)
    found = inspection(folder, trusted)
    if as_json:
        typer.echo(redacted_json(found, indent=2))
    elif found["supported"]:
        typer.echo(f"{found['model_type']}: supported, {found['layers']} layers")
        for writer in found["writers"]:
            typer.echo(f"  layer {writer['layer']}, {writer['component']}: {writer['parameter']}")
    else:
        typer.echo(f"{found['model_type']}: not supported: {found['reason']}")
    if not found["supported"]:
        raise typer.Exit(3)


@config_app.command("show")
@takes_settings
def config_show(given: dict[str, Any]) -> None:
    """Print every setting with its value and where the value comes from."""
    from job.config.schema import describe_settings
    from job.data.sources import parse_source

    settings, lines = describe_settings(**given)
    for name, source in settings.prompt_sets().items():
        lines.append(f"# {name}: {parse_source(source).describe()}")
    typer.echo("\n".join(lines))


@app.command("demo-model")
def demo_model(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="New or empty folder.")],
    arch: Annotated[str, typer.Option(help="llama, qwen3, gemma2, mixtral or qwen3_moe.")] = "llama",
    size: Annotated[str, typer.Option(help="tiny or small.")] = "tiny",
    seed: Annotated[int, typer.Option(help="Seed of the training.")] = 0,
) -> None:
    """Train the built-in model organism and write it with its prompt files."""
    from job.organism.organism import write_organism

    write_organism(folder, arch=arch, size=size, seed=seed, report=lambda line: typer.echo(line, err=True))
    typer.echo(folder)


@app.command()
def demo(workspace: Workspace = None, trials: Trials = None) -> None:
    """Run the whole job on the built-in model organism."""
    from job.organism.organism import run_demo

    outcomes: list[Outcome] = []

    def run_it(settings: Settings, *, new: bool) -> Outcome:
        outcomes.append(_run(settings, new=new))
        return outcomes[-1]

    run_demo(workspace, trials, run_it, lambda line: typer.echo(line, err=True))
    typer.echo(f"open this in a browser: {outcomes[0].folder.page_file}")


def main() -> None:
    """Run the command line and turn expected failures into a line and an exit code."""
    supervised()
    with guarded_output():
        _run_command_line()


def _run_command_line() -> None:
    arguments = sys.argv[1:]
    if arguments[:1] == ["abliterate"]:  # `docker run IMAGE abliterate run` and `docker run IMAGE run` are the same
        arguments = arguments[1:]
    try:
        app(args=arguments or ["--help"], prog_name="abliterate")
    except JobError as error:
        print(f"error: {error.line}", file=sys.stderr)
        sys.exit(error.exit_code)
    except Stopped as stop:
        print(f"stopped by {stop}; run the same command again to continue", file=sys.stderr)
        sys.exit(stop.exit_code)
    except RestartNeeded:
        sys.stdout.flush()
        sys.stderr.flush()
        restart()
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception:  # anything unforeseen: its traceback may quote a secret, which is masked where it is whole
        import traceback

        sys.stderr.write(traceback.format_exc())
        sys.exit(1)
