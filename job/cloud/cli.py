"""`abliterate cloud vast|runpod offers|launch|watch|fetch|destroy`: the same commands for every platform."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from job.cloud.options import Platform, bound, needs_of, terms_of
from job.errors import Stopped, UsageError

if TYPE_CHECKING:
    from job.cloud.launching import Launch, Launcher
    from job.cloud.market import Offer

PLACEHOLDER_IMAGE = "ghcr.io/OWNER/abliteration-job:VERSION"

app = typer.Typer(help="Rent a machine for a job.", no_args_is_help=True, rich_markup_mode=None)

Id = Annotated[str, typer.Argument(metavar="ID", help="The instance or pod, or the label of a launch.")]
Every = Annotated[float, typer.Option(metavar="S", help="Seconds between two looks.")]
Wait = Annotated[float, typer.Option(metavar="MIN", help="Minutes to wait until something is offered.")]
Relaunches = Annotated[int, typer.Option(metavar="N", help="Further machines after an outbid or a dead host.")]
MaxTotal = Annotated[
    float | None, typer.Option(metavar="USD", help="Rent no further machine once all together have cost this.")
]


def offers(platform: Platform, machine: dict[str, Any], wait: Wait = 0.0, every: Every = 30.0) -> None:
    """List what is offered, the cheapest job first."""
    import time

    from job.cloud.account import open_market
    from job.cloud.launching import find_offers

    needs, terms = needs_of(machine), terms_of(machine)
    market = open_market(platform, _say)
    deadline = time.monotonic() + 60 * wait
    while not (found := find_offers(market, needs, terms)):
        if time.monotonic() >= deadline:
            typer.echo("nothing is offered under these terms", err=True)
            raise typer.Exit(76)
        _say(f"nothing is offered; looking again in {every:.0f} s")
        time.sleep(min(every, max(deadline - time.monotonic(), 0.0)))
    for offer in found:
        typer.echo(_line(offer))


def launch(
    platform: Platform,
    machine: dict[str, Any],
    command: Annotated[
        list[str], typer.Argument(metavar="-- COMMAND...", help="What runs there: -- run MODEL --checkpoint URI ...")
    ],
    image: Annotated[str, typer.Option(envvar="ABLITERATION_IMAGE", help="Image, in a registry of yours.")] = "",
    env: Annotated[
        list[str] | None, typer.Option(metavar="NAME[=VALUE]", help="Variable to pass on; may be repeated.")
    ] = None,
    volume: Annotated[str | None, typer.Option(metavar="ID", help="Network volume for the workspace (RunPod).")] = None,
    follow: Annotated[bool, typer.Option("--watch", help="Watch it until it has ended.")] = False,
    wait: Wait = 0.0,
    every: Every = 30.0,
    relaunches: Relaunches = 3,
    max_total: MaxTotal = None,
) -> None:
    """Rent the cheapest machine that would do and start a job there."""
    from job.cloud.launching import Launch, new_label

    if not image or "OWNER/" in image or image.endswith(":VERSION"):
        raise UsageError("there is no image to run", remedy=f"build one, push it and give --image {PLACEHOLDER_IMAGE}")
    named = [entry for entry in env or [] if "=" not in entry]
    plain = dict(entry.split("=", 1) for entry in env or [] if "=" in entry)
    wanted = Launch(
        label=new_label(),
        platform=platform,
        needs=tuple(needs_of(machine)),
        terms=terms_of(machine),
        image=image,
        command=_inner(command),
        env=tuple(named),
        plain_env=plain,
        volume=volume,
    )
    _advise(wanted)
    launcher = _launcher(wanted, every=every)
    launcher.rent(wait)
    typer.echo(wanted.label)
    if follow:
        _watch(launcher, relaunches, wait, max_total)
    else:
        _say(f"follow it with: abliterate cloud {platform} watch {wanted.label}")


def watch(
    platform: Platform,
    id: Id,
    wait: Wait = 60.0,
    every: Every = 30.0,
    relaunches: Relaunches = 3,
    max_total: MaxTotal = None,
) -> None:
    """Follow a launch until it has ended, on another machine if this one is lost."""
    from job.cloud.account import open_market
    from job.cloud.launching import describe, find_launch, records_folder

    found = find_launch(records_folder(), id, platform)
    if found is None:
        typer.echo(describe(open_market(platform, _say).instance(id)))
        _say("this machine has no record of its launch, so it cannot be followed or launched again")
        return
    launcher = _launcher(*found, every=every)
    launcher.adopt()
    if not launcher.launch.instances:
        raise UsageError(f"launch {id} has rented nothing", remedy="launch it again")
    _watch(launcher, relaunches, wait, max_total)


def fetch(
    platform: Platform,
    id: Id,
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Where to put it.")] = Path("."),
    lines: Annotated[int, typer.Option(metavar="N", help="Lines of the log.")] = 5000,
) -> None:
    """Bring back what the platform's API gives: the log, and what it says of the instance."""
    from job.cloud.account import open_market
    from job.events import redact

    instance_id = _instance_id(platform, id)
    market = open_market(platform, _say)
    found = market.instance(instance_id)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{instance_id}.json").write_text(found.model_dump_json(indent=2) + "\n")
    typer.echo(folder / f"{instance_id}.json")
    if found.state == "gone":
        _say("it is gone, and its log with it")
    else:
        (folder / f"{instance_id}.log").write_text(redact(market.logs(instance_id, lines)))
        typer.echo(folder / f"{instance_id}.log")
    for line in ("not fetched:", *market.cannot_fetch(instance_id)):
        _say(line)


def destroy(
    platform: Platform,
    id: Id,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Destroy an instance and all that is on it."""
    from job.cloud.account import open_market
    from job.cloud.launching import describe

    instance_id = _instance_id(platform, id)
    market = open_market(platform, _say)
    found = market.instance(instance_id)
    if found.state == "gone":
        typer.echo(f"{instance_id} is not there")
        return
    if not yes and not (sys.stdin.isatty() and typer.confirm(f"destroy {describe(found)}?")):
        raise UsageError(f"{describe(found)}: not destroyed", remedy="give --yes")
    market.end(instance_id, "destroy")
    if market.instance(instance_id).state != "gone":
        _say("the platform has taken it and still shows it; look again in a minute")
    typer.echo(f"destroyed {instance_id}")


def _say(line: str) -> None:
    from job.events import redact

    typer.echo(redact(line), err=True)


def _inner(command: list[str]) -> tuple[str, ...]:
    """Return what the ENTRYPOINT is given: `abliterate` before it is understood either way."""
    words = command[1:] if command[:1] == ["abliterate"] else command
    if not words:
        raise UsageError("what is to run there?", remedy="end with: -- run MODEL --checkpoint URI --upload URI")
    return tuple(words)


def _advise(wanted: Launch) -> None:
    """Say what would be regretted tomorrow.

    Raises:
        UsageError: An interruptible machine would lose its work.
    """
    import os

    if wanted.terms.interruptible and not wanted.resumable:
        raise UsageError(
            "an interruptible machine may be lost at any second, and the command has no --checkpoint",
            remedy="add --checkpoint hf://USER/REPO or s3://BUCKET/PREFIX to it",
        )
    if not any(word.startswith("--when-done") for word in wanted.command):
        _say("the command has no --when-done: the machine bills on after the job until you destroy it")
    if not any(word.startswith("--upload") for word in wanted.command):
        _say("the command has no --upload: unless its settings name one, the result stays on the machine")
    if os.environ.get("HF_TOKEN") and "HF_TOKEN" not in wanted.env:
        _say("HF_TOKEN is set here and not passed on; --env HF_TOKEN passes it")


def _launcher(wanted: Launch, file: Path | None = None, *, every: float) -> Launcher:
    from job.cloud.account import open_market
    from job.cloud.launching import Launcher, environment, records_folder

    values = environment(wanted.env, wanted.plain_env)
    market = open_market(wanted.platform, _say, secrets=tuple(values[name] for name in wanted.env))
    return Launcher(market, wanted, file or records_folder() / f"{wanted.label}.json", _say, every)


def _watch(launcher: Launcher, relaunches: int, wait: float, max_total: float | None) -> None:
    from job.cloud.watching import Watch

    outcome = Watch(launcher, relaunches=relaunches, wait_minutes=wait, most_dollars=max_total).until_the_end()
    last = launcher.launch.instances[-1].id
    if outcome == "idle":
        _say(f"its command has ended and instance {last} BILLS ON: fetch its log, then destroy it")
        raise typer.Exit(1)
    if outcome == "halted":
        raise typer.Exit(Stopped.exit_code)
    _say("it has ended; `abliterate status --checkpoint URI` tells how")


def _instance_id(platform: Platform, name: str) -> str:
    """Return the id that is meant by an id or by a launch's label."""
    from job.cloud.launching import find_launch, records_folder

    found = find_launch(records_folder(), name, platform)
    if found is not None and name == found[0].label and found[0].instances:
        return found[0].instances[-1].id
    return name


def _line(offer: Offer) -> str:
    """Return an offer in one line."""
    parts = [f"{offer.id}: {offer.need.count}x{offer.need.gpu}, ${offer.dollars:.3f} an hour"]
    if offer.interruptible:
        parts.append("interruptible")
    if offer.job_dollars is not None and offer.hours is not None:
        parts.append(f"job about ${offer.job_dollars:.2f} in {offer.hours:.1f} h")
    if offer.down is not None:
        parts.append(f"{offer.down:.0f}/{offer.up or 0:.0f} Mb/s")
    if offer.reliability is not None:
        parts.append(f"up {100 * offer.reliability:.1f} %")
    return ", ".join(parts + [text for text in (offer.stock and f"stock {offer.stock}", offer.where) if text])


_PLATFORMS: tuple[tuple[Platform, str], ...] = (("vast", "Vast.ai."), ("runpod", "RunPod."))
for _platform, _help in _PLATFORMS:
    _commands = typer.Typer(help=_help, no_args_is_help=True, rich_markup_mode=None)
    for _command in (offers, launch, watch, fetch, destroy):
        _commands.command()(bound(_platform, _command))
    app.add_typer(_commands, name=_platform)
