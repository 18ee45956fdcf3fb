"""`abliterate cloud vast|runpod offers|launch|watch|fetch|destroy`: the same commands for every platform."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from job.cli.cloud_options import Every, MaxTotal, Platform, Relaunches, Wait, bound, needs_of, terms_of
from job.cli.cloud_output import (
    WatchLines,
    echo_json,
    instance_json,
    launch_json,
    offer_line,
    reporting_rentals,
    say,
    show_plan,
    warn_of_missing_ends,
)
from job.cli.help import examples
from job.cli.options import AsJson
from job.errors import MachineError, Stopped, UsageError

if TYPE_CHECKING:
    from job.cloud.inner_command import Inner
    from job.cloud.launch_records import Launch, LaunchFile
    from job.cloud.launching import Launcher
    from job.cloud.provider import Market

_EPILOG = "`abliterate cloud PLATFORM COMMAND -h` lists a command's options and examples."
app = typer.Typer(help="Rent a machine for a job.", no_args_is_help=True, epilog=_EPILOG)

Id = Annotated[str, typer.Argument(metavar="ID", help="The instance or pod, or the label of a launch.")]


def offers(
    platform: Platform, machine: dict[str, Any], wait: Wait = 0.0, every: Every = 30.0, as_json: AsJson = False
) -> None:
    """List the offers, the cheapest job first."""
    import time

    from job.cloud.credentials import open_market
    from job.cloud.launching import find_offers

    needs, terms = needs_of(machine), terms_of(machine)
    market = open_market(platform, say)
    deadline = time.monotonic() + 60 * wait
    while not (found := find_offers(market, needs, terms)):
        if time.monotonic() >= deadline:
            typer.echo("no machine is offered under these terms", err=True)
            raise typer.Exit(76)
        say(f"no machine is offered; asking again in {every:.0f} s")
        time.sleep(min(every, max(deadline - time.monotonic(), 0.0)))
    if as_json:
        echo_json([offer.model_dump(mode="json") for offer in found])
        return
    for offer in found:
        typer.echo(offer_line(offer))


# Long: half of it are options.
def launch(
    platform: Platform,
    machine: dict[str, Any],
    context: typer.Context,
    command: Annotated[
        list[str],
        typer.Argument(metavar="-- COMMAND...", help="The command to run there: -- run MODEL --checkpoint URI ..."),
    ],
    image: Annotated[
        str,
        typer.Option(
            envvar="ABLITERATION_IMAGE", metavar="NAME:TAG", help="Container image; by default that of this release."
        ),
    ] = "",
    env: Annotated[
        list[str] | None, typer.Option(metavar="NAME[=VALUE]", help="Environment variable to pass on; repeatable.")
    ] = None,
    volume: Annotated[str | None, typer.Option(metavar="ID", help="Network volume for the workspace (RunPod).")] = None,
    follow: Annotated[bool, typer.Option("--watch", help="Watch the machine until it has ended.")] = False,
    wait: Wait = 0.0,
    every: Every = 30.0,
    relaunches: Relaunches = 3,
    max_total: MaxTotal = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would be rented and its price, and rent nothing.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Rent the cheapest machine that fits the job and start it there."""
    from job.cloud.credentials import open_market
    from job.cloud.image import chosen_image
    from job.cloud.inner_command import check_inner
    from job.cloud.launch_records import Launch, LaunchFile, new_label, records_folder
    from job.cloud.launching import environment, find_offers

    chosen = chosen_image(image)
    named = [entry for entry in env or [] if "=" not in entry]
    plain = dict(entry.split("=", 1) for entry in env or [] if "=" in entry)
    words = _inner(command)
    needs, variables = tuple(needs_of(machine)), environment(named, plain)
    inner = check_inner(context.find_root().command, words, variables, volume is not None)
    wanted = Launch(
        label=new_label(),
        platform=platform,
        needs=needs,
        terms=terms_of(machine),
        image=chosen,
        command=words,
        env=tuple(named),
        plain_env=plain,
        volume=volume,
        checkpoint=inner.checkpoint,
    )
    if not image:
        say(f"image: {chosen}; --image or ABLITERATION_IMAGE names your own")
    _advise(wanted, inner)
    if dry_run:
        found = find_offers(open_market(platform, say), needs, wanted.terms)
        if not found:
            raise MachineError("no machine is offered under these terms", remedy="relax them, or try again later")
        warn_of_missing_ends(inner, found[0])
        show_plan(wanted, found[0], as_json)
        return
    launcher = _launcher(LaunchFile(wanted, records_folder() / f"{wanted.label}.json"), every)
    launcher.notice = lambda offer: warn_of_missing_ends(inner, offer)
    with reporting_rentals(launcher):
        launcher.rent(wait)
        if not as_json:
            typer.echo(wanted.label)
        elif not follow:
            echo_json(launch_json(launcher.launch))
        if follow:
            _watch(launcher, relaunches, wait, max_total, as_json)
        else:
            say(f"follow it with: abliterate cloud {platform} watch {wanted.label}")


def watch(
    platform: Platform,
    id: Id,
    wait: Wait = 60.0,
    every: Every = 30.0,
    relaunches: Relaunches = 3,
    max_total: MaxTotal = None,
    as_json: AsJson = False,
) -> None:
    """Follow a launch until it ends; rent another machine if one is lost."""
    from job.cloud.credentials import open_market
    from job.cloud.launch_records import find_launch, records_folder
    from job.cloud.launching import describe

    found = find_launch(records_folder(), id, platform)
    if found is None:
        seen = open_market(platform, say).instance(id)
        if as_json:
            echo_json(instance_json(platform, seen), one_line=True)
        else:
            typer.echo(describe(seen))
        say("this computer has no record of its launch, so it cannot be followed or launched again")
        return
    launcher = _launcher(found, every)
    with reporting_rentals(launcher):
        launcher.adopt()
        if not launcher.launch.instances:
            raise UsageError(f"launch {id} has rented nothing", remedy="launch it again")
        _watch(launcher, relaunches, wait, max_total, as_json)


def fetch(
    platform: Platform,
    id: Id,
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder to write to.")] = Path("."),
    lines: Annotated[int, typer.Option(metavar="N", help="How many lines of the log to fetch.")] = 5000,
    as_json: AsJson = False,
) -> None:
    """Fetch the log and the platform's record of an instance."""
    from job.cloud.credentials import open_market
    from job.storage.atomic import ensure_folder
    from job.text.redaction import redact

    instance_id = _instance_id(platform, id)
    market = open_market(platform, say)
    found = market.instance(instance_id)
    ensure_folder(folder)
    record, log = folder / f"{instance_id}.json", folder / f"{instance_id}.log"
    record.write_text(redact(found.model_dump_json(indent=2)) + "\n")
    typer.echo(record, err=as_json)
    if found.state == "gone":
        say("the instance and its log are gone")
    else:
        log.write_text(redact(market.logs(instance_id, lines)))
        typer.echo(log, err=as_json)
    for line in ("not fetched:", *market.cannot_fetch(instance_id)):
        say(line)
    if as_json:
        kept = None if found.state == "gone" else str(log)
        echo_json({"instance": instance_id, "state": found.state, "record": str(record), "log": kept})


def destroy(
    platform: Platform,
    id: Id,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask for confirmation.")] = False,
    every: Every = 30.0,
    as_json: AsJson = False,
) -> None:
    """Destroy an instance, or all of a launch, and wait until they are gone."""
    from job.cloud.credentials import open_market
    from job.cloud.launch_records import find_launch, records_folder
    from job.cloud.launching import Launcher

    market = open_market(platform, say)
    found = find_launch(records_folder(), id, platform)
    launcher = Launcher(market, found, say, every) if found is not None else None
    if launcher is not None and id == launcher.launch.label:
        launcher.adopt()
        ids = [rented.id for rented in launcher.launch.left]
        concerned = [rented.id for rented in launcher.launch.instances]
        if not ids:
            typer.echo(f"{id}: already gone", err=as_json)
    else:
        concerned = ids = _ids_of(market, id)
    targets = _confirmed(market, ids, launcher, yes=yes, as_json=as_json)
    recorded = {rented.id for rented in launcher.launch.left} if launcher is not None else set()
    if launcher is not None:
        with reporting_rentals(launcher):
            launcher.destroyer.destroy(targets)
    _destroy_until_gone(market, [target for target in targets if target not in recorded], every)
    for target in targets:
        typer.echo(f"destroyed {target}", err=as_json)
    if as_json:
        echo_json({"destroyed": targets, "already_gone": [one for one in concerned if one not in targets]})


def _ids_of(market: Market, name: str) -> list[str]:
    """Resolve an id, or the label of a launch that is not recorded here."""
    import re

    if not name.startswith("abliterate-"):
        return [name]
    ours = re.compile(re.escape(name) + r"(-\d+)?")
    ids = [
        instance.id
        for instance in market.instances()
        if instance.state != "gone" and (ours.fullmatch(instance.label) or ours.fullmatch(instance.marker))
    ]
    if not ids:
        raise UsageError(f"{name} is neither a launch recorded here nor an instance", remedy="give its id")
    return ids


def _confirmed(market: Market, ids: list[str], launcher: Launcher | None, *, yes: bool, as_json: bool) -> list[str]:
    """Return those instances that exist, after confirmation. Raises UsageError without it."""
    import time

    from job.cloud.launching import describe
    from job.cloud.termination import APPEAR_SECONDS

    targets = []
    for id in ids:
        found = market.instance(id)
        rented = next((rented for rented in launcher.launch.left if rented.id == id), None) if launcher else None
        if found.state == "gone" and (rented is None or time.time() - rented.at >= APPEAR_SECONDS):
            typer.echo(f"{id} does not exist", err=as_json)
            if launcher is not None:
                launcher.record.note_end("gone", id)
            continue
        if not yes and not (sys.stdin.isatty() and typer.confirm(f"destroy {describe(found)}?", err=as_json)):
            raise UsageError(f"{describe(found)}: not destroyed", remedy="give --yes")
        if launcher is not None and found.state != "gone":
            launcher.destroyer.saw(id)
        targets.append(id)
    return targets


def _destroy_until_gone(market: Market, ids: list[str], every: float) -> None:
    """Destroy instances that no launch's record owns."""
    from job.cloud.termination import Termination

    endings = [Termination(market, id, say, pause=min(every, 5.0), longest=min(2 * every, 60.0)) for id in ids]
    try:
        for ending in endings:
            ending.insist()
    except BaseException:
        say(f"{market.name}: may not have ended and MAY BILL ON: {', '.join(ids)}; end it at {market.console}")
        raise


def _inner(command: list[str]) -> tuple[str, ...]:
    """Return the ENTRYPOINT's arguments, with or without a leading `abliterate`."""
    from job.text.redaction import holds_secret

    words = command[1:] if command[:1] == ["abliterate"] else command
    if any(map(holds_secret, words)):
        raise UsageError(
            "the command after -- holds a secret, which would be stored on this computer and shown by the platform",
            remedy="set it in the environment, here or as the platform's secret, and pass it on with --env NAME",
        )
    if not words:
        raise UsageError("there is no command to run", remedy="end with: -- run MODEL --checkpoint URI --upload URI")
    return tuple(words)


def _advise(wanted: Launch, inner: Inner) -> None:
    """Warn of costly omissions. Raises UsageError if an interruptible machine would lose its work."""
    import os

    for note in inner.notes:
        say(note)
    if wanted.terms.interruptible and not wanted.resumable:
        raise UsageError(
            "the command for an interruptible machine has no --checkpoint off the machine",
            remedy="add --checkpoint hf://USER/REPO or s3://BUCKET/PREFIX to it",
        )
    if not inner.uploads:
        say("the command has no --upload: unless the settings name a target, the result stays on the machine")
    if os.environ.get("HF_TOKEN") and "HF_TOKEN" not in wanted.env:
        say("HF_TOKEN is set here but not passed on; pass it with --env HF_TOKEN")


def _launcher(record: LaunchFile, every: float) -> Launcher:
    from job.cloud.credentials import open_market
    from job.cloud.launching import Launcher, environment

    launch = record.launch
    values = environment(launch.env, launch.plain_env)
    market = open_market(launch.platform, say, secrets=tuple(values[name] for name in launch.env))
    return Launcher(market, record, say, every)


def _watch(launcher: Launcher, relaunches: int, wait: float, max_total: float | None, as_json: bool) -> None:
    from job.cloud.watching import Watch

    lines = WatchLines(launcher)
    watch = Watch(launcher, relaunches=relaunches, wait_minutes=wait, most_dollars=max_total)
    if as_json:
        lines.show(None)
        watch.on_change = lines.show
    outcome = watch.until_the_end()
    if as_json:
        lines.show(None, outcome)
    last = launcher.launch.instances[-1].id
    command = f"abliterate cloud {launcher.launch.platform}"
    if outcome == "idle":
        say(f"the command has ended and instance {last} BILLS ON: fetch its log, then destroy it")
        raise typer.Exit(1)
    if outcome == "halted":
        raise typer.Exit(Stopped.exit_code)
    if outcome == "missing":
        raise MachineError(f"instance {last} was rented and has not appeared", remedy="launch again once it is gone")
    if outcome == "stopped":
        say(f"instance {last} is stopped, and its DISK BILLS ON until: {command} destroy {last} --yes")
    say("the launch has ended; see `abliterate status --checkpoint URI`")
    if lines.lost is not None:
        raise lines.lost


def _instance_id(platform: Platform, name: str) -> str:
    """Resolve an id or a launch's label to an id."""
    from job.cloud.launch_records import find_launch, records_folder

    found = find_launch(records_folder(), name, platform)
    if found is not None and name == found.launch.label and found.launch.instances:
        return found.launch.instances[-1].id
    return name


_PLATFORMS: tuple[tuple[Platform, str], ...] = (("vast", "Vast.ai."), ("runpod", "RunPod."))
for _platform, _help in _PLATFORMS:
    _commands = typer.Typer(help=_help, no_args_is_help=True, epilog=_EPILOG)
    for _command in (offers, launch, watch, fetch, destroy):
        _commands.command(epilog=examples(f"cloud {_command.__name__}", _platform))(bound(_platform, _command))
    app.add_typer(_commands, name=_platform)
