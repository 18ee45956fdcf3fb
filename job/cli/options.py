"""Options that several commands take."""

from __future__ import annotations

import functools
import inspect
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO, get_type_hints

import typer

from job.cli.help import SOURCES, grouped, in_group
from job.config.option_names import NESTED_OPTIONS, parsed_option
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

Format = Annotated[
    str | None,
    typer.Option(
        "--format",
        "--export-format",
        metavar="FORMAT",
        help="What to write: merged (the whole model), adapter (a LoRA for PEFT) or directions (the edit alone).",
    ),
]

Targets = Annotated[
    list[str] | None,
    typer.Option(
        "--upload", metavar="URI", help="Target: file:///dir, hf://user/repo, s3://bucket/prefix; repeatable."
    ),
]

Device = Annotated[
    str | None, typer.Option(metavar="DEVICE", help="Device to use instead of the job's: cpu, cuda, cuda:N or mps.")
]

Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Print every trial, not only the best so far.")]

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]

Prompts = Annotated[
    str | None,
    typer.Option(metavar="SPEC", help="File, folder or DATASET[@REV][:CONFIG], either with #SPLIT[/COLUMN]."),
]

WhenDone = Annotated[
    str | None,
    typer.Option(
        metavar="END", help="End of the rented machine once the result is delivered: nothing, stop or destroy."
    ),
]

WhenFailed = Annotated[
    str | None,
    typer.Option(
        metavar="END",
        help="End of the rented machine if the job fails or its process dies: nothing, stop or destroy.",
    ),
]

Trials = Annotated[
    int | None,
    typer.Option(metavar="N", help="Edits that the search tries; unset: 24 around edits found by gradient, else 200."),
]

# Options of all commands with a job's settings, by the setting's name.
_SETTINGS: dict[str, Any] = {
    "model": Annotated[
        str | None,
        typer.Argument(help="Model: a folder, or NAME[@REVISION] on the Hub; may be set in the settings file."),
    ],
    "behaviour": Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="What to remove: refusal, over-refusal, disclaimers, flattery or prose, with prompts and markers.",
        ),
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
        int | None, typer.Option(metavar="N", help="Trials before the sampler's: known points, then random ones.")
    ],
    "seed": Annotated[int | None, typer.Option(metavar="N", help="Seed of search and split.")],
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
    "max_hours": Annotated[
        str | None, typer.Option(metavar="HOURS", help="Longest time of the job; also with a unit, such as 90m.")
    ],
    "max_cost": Annotated[float | None, typer.Option(metavar="USD", help="Highest cost of the job in dollars.")],
    "grace": Annotated[
        str | None,
        typer.Option(metavar="SECONDS", help="How long a stopped search may take to finish its batch; also 1m."),
    ],
    "wait_for_gpu": Annotated[
        str | None,
        typer.Option(metavar="MINUTES", help="How long to wait until other processes leave the GPUs; also 2h."),
    ],
    "export_format": Annotated[
        str | None,
        typer.Option(
            "--export-format",
            "--format",
            metavar="FORMAT",
            help="What to export: merged (the whole model), adapter (a LoRA for PEFT) or directions (the edit alone).",
        ),
    ],
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
        str | None,
        typer.Option(metavar="ENGINE", help="What runs the workers: local, or ray on one machine or several."),
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
        str | None, typer.Option(metavar="WHO", help="Visibility of the Hub repository: private, gated or public.")
    ],
    "device": Annotated[
        str | None,
        typer.Option(metavar="DEVICE", help="Device of the model: auto, cpu, cuda, cuda:N or mps."),
    ],
    "device_map": Annotated[
        str | None,
        typer.Option(
            metavar="MAP",
            help="How the model is spread over GPUs: single, balanced, sequential, auto, or a TOML table of modules.",
        ),
    ],
    "quantization": Annotated[
        str | None,
        typer.Option(
            metavar="KIND",
            help="none, or bnb-4bit: load the weights in 4 bits; exports hold full weights.",
        ),
    ],
    "batch_size": Annotated[
        int | None,
        typer.Option(metavar="ROWS", help="Rows of a forward pass, over all its trials; 0: by a rule."),
    ],
    "trust_remote_code": Annotated[
        bool | None, typer.Option("--trust-remote-code", help="Run the Python code that comes with the model.")
    ],
}
SETTING_OPTIONS = grouped(_SETTINGS, NESTED_OPTIONS)

Profile = Annotated[str | None, typer.Option(metavar="NAME", help="Built-in settings: heretic, that tool's defaults.")]

Config = Annotated[Path | None, typer.Option(metavar="FILE", help="Settings file in TOML.")]

Assignments = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any setting; the value is written as TOML.")
]

SOURCE_OPTIONS = in_group({"profile": Profile, "config": Config, "assignments": Assignments}, SOURCES)


def takes_settings(command: Callable[..., None]) -> Callable[..., None]:
    """Add all options of a job's settings to a command, passed as `load_settings`'s arguments in its first one."""
    own = list(inspect.signature(command).parameters.values())[1:]

    @functools.wraps(command)
    def wrapper(**values: Any) -> None:
        options = {name: values.pop(name) for name in SETTING_OPTIONS}
        given = {
            "options": {
                NESTED_OPTIONS.get(name, name): parsed_option(name, value)
                for name, value in options.items()
                if value not in (None, [])
            },
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


def emphasised(line: str) -> str:
    """Return a line in bold green where it goes to a terminal that shows colours."""
    plain = not sys.stdout.isatty() or "NO_COLOR" in os.environ or os.environ.get("TERM") == "dumb"
    return line if plain else typer.style(line, fg="green", bold=True)


@contextmanager
def json_alone(as_json: bool) -> Iterator[None]:
    """Send what libraries, worker processes and a model's own code print to standard error, for a command's JSON."""
    if not as_json:
        yield
        return
    with redirect_stdout(sys.stderr), _descriptor_redirected(sys.__stdout__, sys.__stderr__):
        yield


@contextmanager
def _descriptor_redirected(out: TextIO | None, err: TextIO | None) -> Iterator[None]:
    """Let the descriptor of a stream lead to another's; processes started meanwhile inherit it."""
    if out is None or err is None:  # no console
        yield
        return
    out.flush()
    kept = os.dup(out.fileno())
    try:
        os.dup2(err.fileno(), out.fileno())
        yield
    finally:
        out.flush()
        os.dup2(kept, out.fileno())
        os.close(kept)


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
