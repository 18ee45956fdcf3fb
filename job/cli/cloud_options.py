"""Options that describe a machine, shared by all platforms' commands."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_type_hints

import typer

from job.cli.help import in_group, parsed
from job.errors import UsageError

if TYPE_CHECKING:
    from job.cloud.provider import MachineNeeds, Terms

Platform = Literal["vast", "runpod"]

Every = Annotated[
    float,
    typer.Option(
        "--every", "--interval", metavar="SECONDS", parser=parsed("s", 0.0), help="Time between two queries; also 2m."
    ),
]
Wait = Annotated[
    float, typer.Option(metavar="MINUTES", parser=parsed("m"), help="How long to wait for an offer; also 2h.")
]
Relaunches = Annotated[
    int, typer.Option(metavar="N", help="How often to rent another machine after an outbid or a dead host.")
]
MaxTotal = Annotated[
    float | None, typer.Option(metavar="USD", help="Rent no other machine once the launch has cost this many dollars.")
]

# Options of wanted machines, for `offers` and `launch`.
MACHINE_OPTIONS: dict[str, tuple[Any, Any]] = {
    "preflight": (
        Annotated[
            list[Path] | None,
            typer.Option(metavar="FILE", help="Output of `abliterate preflight ... --on ... --json`; repeatable."),
        ],
        None,
    ),
    "on": (
        Annotated[list[str] | None, typer.Option(metavar="NxCARD", help="GPUs to rent, e.g. 4xRTX4090; repeatable.")],
        None,
    ),
    "disk": (Annotated[int, typer.Option(metavar="GB", help="Disk size in GB, with --on.")], 200),
    "hours": (
        Annotated[
            float | None,
            typer.Option(metavar="HOURS", parser=parsed("h"), help="Expected time of the job, with --on; also 90m."),
        ],
        None,
    ),
    "interruptible": (
        Annotated[bool, typer.Option("--interruptible", help="Rent an interruptible machine by bid, not on demand.")],
        False,
    ),
    "bid": (Annotated[float | None, typer.Option(metavar="USD", help="Bid in dollars an hour.")], None),
    "max_price": (Annotated[float | None, typer.Option(metavar="USD", help="Highest price in dollars an hour.")], None),
    "min_down": (Annotated[float, typer.Option(metavar="MBPS", help="Lowest download rate in Mb/s.")], 100.0),
    "min_up": (Annotated[float, typer.Option(metavar="MBPS", help="Lowest upload rate in Mb/s.")], 0.0),
    "min_reliability": (
        Annotated[float, typer.Option(metavar="X", help="Lowest reliability of a host, 0 to 1.")],
        0.98,
    ),
    "min_cuda": (
        Annotated[str | None, typer.Option(metavar="X.Y", help="Lowest CUDA version that the driver supports.")],
        None,
    ),
    "unverified": (Annotated[bool, typer.Option("--unverified", help="Include unverified hosts.")], False),
    "limit": (Annotated[int, typer.Option(metavar="N", help="How many offers to list.")], 20),
}


def needs_of(machine: dict[str, Any]) -> list[MachineNeeds]:
    """Return the machines described by `MACHINE_OPTIONS`. Raises UsageError if there are none."""
    from job.cli.cloud_requirements import need_of_cards, need_of_survey

    needs = [need_of_survey(path) for path in machine["preflight"] or []]
    needs += [need_of_cards(text, machine["disk"], machine["hours"]) for text in machine["on"] or []]
    if not needs:
        raise UsageError("no machine is specified", remedy="give --on 1xRTX4090, or --preflight FILE")
    if machine["min_cuda"] is not None:
        needs = [need.model_copy(update={"min_cuda": machine["min_cuda"]}) for need in needs]
    return needs


def terms_of(machine: dict[str, Any]) -> Terms:
    """Return the terms described by `MACHINE_OPTIONS`."""
    from job.cloud.provider import Terms

    return Terms(
        interruptible=machine["interruptible"] or machine["bid"] is not None,
        bid=machine["bid"],
        most_dollars=machine["max_price"],
        min_down=machine["min_down"],
        min_up=machine["min_up"],
        min_reliability=machine["min_reliability"],
        verified=not machine["unverified"],
        limit=machine["limit"],
    )


def bound(platform: Platform, command: Callable[..., None]) -> Callable[..., None]:
    """Bind a command to one platform, and add all machine options if it takes a machine."""
    hints = get_type_hints(command, include_extras=True)
    own = list(inspect.signature(command).parameters.values())[1:]
    takes_machine = any(parameter.name == "machine" for parameter in own)

    @functools.wraps(command)
    def wrapper(**values: Any) -> None:
        if takes_machine:
            values["machine"] = {name: values.pop(name) for name in MACHINE_OPTIONS}
        command(platform, **values)

    options = MACHINE_OPTIONS if takes_machine else {}
    kinds = in_group({name: kind for name, (kind, _) in options.items()}, "Machine")
    parameters = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kinds[name])
        for name, (_, default) in options.items()
    ]
    parameters += [
        parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY, annotation=hints[parameter.name])
        for parameter in own
        if parameter.name != "machine"
    ]
    wrapper.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # read by inspect.signature
    wrapper.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return wrapper
