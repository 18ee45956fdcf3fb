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


Workspace = Annotated[str | None, typer.Option(metavar="DIR", help="Folder that holds the run folders.")]

Job = Annotated[str | None, typer.Option(metavar="ID", help="Job to use if the workspace holds several.")]

Checkpoint = Annotated[
    str | None, typer.Option(metavar="URI", help="Checkpoint to read the job from if it is not in the workspace.")
]

Extensions = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Setting that extends the job or says how to reach its resources."),
]

TrialNumber = Annotated[
    int | None, typer.Option("--trial", metavar="N", help="Trial number, as `abliterate front` lists them.")
]

Format = Annotated[str | None, typer.Option("--format", help="merged, adapter or directions.")]

Targets = Annotated[
    list[str] | None,
    typer.Option(
        "--upload", metavar="URI", help="Target: file:///dir, hf://user/repo, s3://bucket/prefix; repeatable."
    ),
]

Device = Annotated[str | None, typer.Option(help="Device to use instead of the job's: cpu, cuda, cuda:N or mps.")]

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]

Prompts = Annotated[
    str | None,
    typer.Option(metavar="SPEC", help="File, folder or DATASET[@REV][:CONFIG], either with #SPLIT[/COLUMN]."),
]

WhenDone = Annotated[
    str | None,
    typer.Option(help="What to do with the rented machine once the result is delivered: nothing, stop or destroy."),
]

WhenFailed = Annotated[
    str | None,
    typer.Option(
        help="What to do with the rented machine if the job fails or its process dies: nothing, stop or destroy."
    ),
]

Trials = Annotated[int | None, typer.Option(help="Number of edits that the search tries.")]

# Options of all commands with a job's settings, by the setting's name.
SETTING_OPTIONS: dict[str, Any] = {
    "model": Annotated[
        str | None,
        typer.Argument(help="Model: a folder, or NAME[@REVISION] on the Hub; may be set in the settings file."),
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
        int | None, typer.Option(help="Trials before the sampler's: known points, then random ones.")
    ],
    "seed": Annotated[int | None, typer.Option(help="Seed of the search and of the split of the evaluation sets.")],
    "kl_tokens": Annotated[
        int | None, typer.Option(metavar="N", help="Tokens of the base model's responses over which KL is averaged.")
    ],
    "skip_kl_above": Annotated[
        float | None, typer.Option(metavar="X", help="Skip the responses of trials with a larger KL.")
    ],
    "tune": Annotated[
        bool | None, typer.Option("--tune", help="Measure at the first start which batch size is fastest.")
    ],
    "allow": Annotated[
        list[str] | None, typer.Option(metavar="CHECK", help="Preflight check that may fail; repeatable.")
    ],
    "price": Annotated[float | None, typer.Option(metavar="USD", help="Price of this machine in dollars an hour.")],
    "max_hours": Annotated[float | None, typer.Option(metavar="H", help="Longest time of the job in hours.")],
    "max_cost": Annotated[float | None, typer.Option(metavar="USD", help="Highest cost of the job in dollars.")],
    "grace": Annotated[
        float | None, typer.Option(metavar="S", help="Seconds that a stopped search may take to finish its batch.")
    ],
    "wait_for_gpu": Annotated[
        float | None, typer.Option(metavar="MIN", help="Minutes to wait until other processes leave the GPUs.")
    ],
    "export_format": Annotated[str | None, typer.Option(help="merged, adapter or directions.")],
    "max_kl": Annotated[float | None, typer.Option(metavar="X", help="Do not upload if the held-out KL exceeds this.")],
    "max_refusals": Annotated[
        int | None, typer.Option(metavar="N", help="Do not upload if more than N held-out prompts are refused.")
    ],
    "checkpoint": Annotated[
        str | None,
        typer.Option(
            metavar="URI", help="Mirror from which another machine can continue the job: s3://, hf://, file:///."
        ),
    ],
    "workers": Annotated[
        int | None, typer.Option(metavar="N", help="Worker processes that evaluate trials; unset: one per GPU, or one.")
    ],
    "engine": Annotated[
        str | None, typer.Option(help="What runs the workers: local, or ray on one machine or several.")
    ],
    "address": Annotated[
        str | None,
        typer.Option(metavar="HOST:PORT", help="Address of a running Ray cluster, or auto; unset: start one."),
    ],
    "require_checkpoint": Annotated[
        bool | None, typer.Option("--require-checkpoint", help="Stop the job if the checkpoint stays unreachable.")
    ],
    "when_done": WhenDone,
    "when_failed": WhenFailed,
    "upload": Annotated[
        list[str] | None,
        typer.Option(metavar="URI", help="Target: file:///dir, hf://user/repo, s3://bucket/prefix; repeatable."),
    ],
    "visibility": Annotated[
        str | None, typer.Option(help="Visibility of the Hub repository: private, gated or public.")
    ],
}

Profile = Annotated[str | None, typer.Option(metavar="NAME", help="Built-in settings: heretic, that tool's defaults.")]

Config = Annotated[Path | None, typer.Option(metavar="FILE", help="Settings file in TOML.")]

Assignments = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any setting; the value is written as TOML.")
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
