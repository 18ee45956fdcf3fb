"""`abliterate run`, `resume` and `preflight`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from job.cli.app import app
from job.cli.help import examples
from job.cli.options import (
    AsJson,
    Checkpoint,
    Extensions,
    Job,
    Targets,
    Trials,
    Verbose,
    WhenDone,
    WhenFailed,
    Workspace,
    json_alone,
    takes_settings,
    where_is,
)
from job.cli.outcome import print_outcome
from job.errors import UsageError
from job.text.redaction import redacted_json

if TYPE_CHECKING:
    from job.config.load import LoadedSettings
    from job.config.schema import Settings
    from job.export.reproduction import Again
    from job.lifecycle.outcome import Outcome
    from job.lifecycle.running import RunningJob
    from job.preflight.inputs import PreflightInputs


@app.command(epilog=examples("run"))
@takes_settings
def run(
    given: dict[str, Any],
    new: Annotated[bool, typer.Option("--new", help="Start another job beside one with other settings.")] = False,
    reproduce: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Reproduce an export from its reproduce.json and compare the hashes."),
    ] = None,
    with_search: Annotated[
        bool, typer.Option("--with-search", help="With --reproduce: repeat the search too, not only the edit.")
    ] = False,
    verbose: Verbose = False,
    as_json: AsJson = False,
) -> None:
    """Find directions, search edits, export, verify and deliver; run again to continue."""
    from job.config.load import load_settings

    again: Again | None = None
    if reproduce is None:
        loaded = load_settings(**given)
    else:
        loaded, again = _reproduced(given, reproduce, with_search)
    outcome = run_settings(loaded.settings, new=new, notes=loaded.notes, again=again, verbose=verbose, as_json=as_json)
    print_outcome(outcome, as_json)


def _reproduced(given: dict[str, Any], reproduce: Path, with_search: bool) -> tuple[LoadedSettings, Again]:
    """Return the settings of an export, with those given here, and the export to compare with."""
    from job.config.load import leaves, load_settings
    from job.config.origins import left_out_line
    from job.export.reproduction import Again, fixed_settings, read_reproduction, require_same_repository

    original = read_reproduction(reproduce)
    fixed = fixed_settings(original, str(reproduce))
    loaded = load_settings(**given, fixed=fixed)
    if line := left_out_line(str(reproduce), fixed.left_out, leaves(loaded.settings.model_dump(mode="json"))):
        typer.echo(f"note: {line}", err=True)
    named = loaded.settings.model if loaded.sources.get("model") == "command line" else None
    require_same_repository(original, loaded.settings, named)
    return loaded, Again(original, with_search, reproduce.parent)


def _stages(running: RunningJob, inputs: PreflightInputs) -> Outcome:
    from job.pipeline import run as run_stages  # imports slowly, and a finished job does not need it

    return run_stages(running, inputs)


def run_settings(
    settings: Settings,
    *,
    new: bool,
    notes: Sequence[str] = (),
    again: Again | None = None,
    verbose: bool = False,
    as_json: bool = False,
) -> Outcome:
    """Run a job; with `as_json`, what it prints goes to standard error."""
    from job.system.signals import StopSignals

    signals = StopSignals()
    with signals.installed(), json_alone(as_json):
        from job.lifecycle.start import run as run_job
        from job.storage.events import Events

        events = Events(verbose=verbose)
        return run_job(settings, new=new, events=events, signals=signals, stages=_stages, notes=notes, again=again)


@app.command(epilog=examples("resume"))
def resume(
    workspace: Workspace = None,
    job: Job = None,
    checkpoint: Checkpoint = None,
    trials: Trials = None,
    upload: Targets = None,
    when_done: WhenDone = None,
    when_failed: WhenFailed = None,
    assignments: Extensions = None,
    verbose: Verbose = False,
    as_json: AsJson = False,
) -> None:
    """Continue a job from its run folder or its checkpoint alone, with more trials or other targets if given.

    The end of a rental (--when-done, --when-failed) is not taken over from the job: it is about the machine.
    """
    from job.system.signals import StopSignals

    signals = StopSignals()
    with signals.installed(), json_alone(as_json):
        from job.lifecycle.resumption import resumption
        from job.lifecycle.start import carry_out
        from job.storage.events import Events

        others = {"trials": trials, "upload": upload}
        where = where_is(workspace, job, checkpoint, assignments)
        events = Events(verbose=verbose)
        ends = {"when_done": when_done, "when_failed": when_failed}
        start = resumption(where, ends, events.say, **{name: value for name, value in others.items() if value})
        outcome = carry_out(start, events, signals, _stages)
    print_outcome(outcome, as_json)


def _is_no_more(_: list[str] | None) -> None:
    """Report a command's replacement during parsing, so that no machine is rented for it."""
    raise UsageError(
        "`abliterate worker` was removed: other machines evaluate trials through Ray",
        remedy="start a Ray cluster on them, and run the job with --engine ray --address HOST:PORT",
    )


@app.command(hidden=True, context_settings={"ignore_unknown_options": True})
def worker(words: Annotated[list[str] | None, typer.Argument(callback=_is_no_more)] = None) -> None:
    """Say what took this command's place."""


@app.command(epilog=examples("preflight"))
@takes_settings
def preflight(
    given: dict[str, Any],
    as_json: AsJson = False,
    on: Annotated[
        str | None,
        typer.Option(
            metavar="MACHINE", help="Plan for another machine: 4xRTX4090, H200, or a file with a machine reading."
        ),
    ] = None,
) -> None:
    """Check everything that a run needs, without side effects (exit code 3 or 76 if it cannot start)."""
    from job.config.load import load_settings
    from job.lifecycle.start import check_job
    from job.preflight.gpu_table import parse_on
    from job.preflight.readings import read_reading
    from job.storage.events import Events

    loaded = load_settings(**given)
    reading = None
    if on is not None:
        reading = read_reading(Path(on)) if Path(on).is_file() else parse_on(on)
    with json_alone(as_json):
        survey = check_job(loaded.settings, events=Events(), notes=loaded.notes, on=reading)
    if as_json:
        typer.echo(redacted_json(survey.as_json(), indent=2))
    else:
        from job.preflight.show import show

        show(survey)
    if survey.exit_code:
        raise typer.Exit(survey.exit_code)
