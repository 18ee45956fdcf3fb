"""Options that several commands take."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from job.errors import UsageError

if TYPE_CHECKING:
    from job.lifecycle.locate import Whereabouts
    from job.records import ExportFormat
    from job.storage.run_folder import RunFolder


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

# Options of all commands with a job's settings, by the setting's name.
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
    "max_kl": Annotated[float | None, typer.Option(metavar="X", help="Do not upload if the held-out KL is larger.")],
    "max_refusals": Annotated[
        int | None, typer.Option(metavar="N", help="Do not upload if more held-out prompts are refused.")
    ],
    "checkpoint": Annotated[
        str | None, typer.Option(metavar="URI", help="Mirror for other machines to go on from: s3://, hf://, file:///.")
    ],
    "workers": Annotated[
        int | None, typer.Option(metavar="N", help="Processes that evaluate trials; unset: one for every GPU, or one.")
    ],
    "engine": Annotated[str | None, typer.Option(help="What runs them: local, or ray on one machine or several.")],
    "address": Annotated[
        str | None,
        typer.Option(metavar="HOST:PORT", help="A running Ray cluster, or auto; unset: one is started."),
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
    """Add all options of a job's settings to a command, passed as `load_settings`'s arguments in its first one."""
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


@contextmanager
def json_alone(as_json: bool) -> Iterator[None]:
    """Send what libraries and a model's own code print to standard error, where the command prints JSON."""
    with redirect_stdout(sys.stderr) if as_json else nullcontext():
        yield


def find_job(workspace: str | None, job: str | None) -> RunFolder:
    """Return the run folder of a job in a workspace."""
    return where_is(workspace, job).folder()


def where_is(
    workspace: str | None, job: str | None, checkpoint: str | None = None, assignments: Sequence[str] | None = None
) -> Whereabouts:
    """Return the location of a command's job."""
    from job.config.load import default_workspace
    from job.lifecycle.locate import Whereabouts

    return Whereabouts(Path(workspace or default_workspace()), job, checkpoint, tuple(assignments or ()))


def export_format(name: str | None) -> ExportFormat | None:
    """Return an export format by its name, None for None."""
    from job.records import FORMATS

    for form in FORMATS:
        if name == form:
            return form
    if name is not None:
        raise UsageError(f"there is no format {name}", remedy=f"choose from: {', '.join(FORMATS)}")
    return None
