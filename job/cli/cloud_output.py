"""What `abliterate cloud` prints about offers, launches and what may bill on: lines for people, and JSON."""

from __future__ import annotations

import shlex
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import typer

from job.errors import MachineError

if TYPE_CHECKING:
    from job.cloud.inner_command import Inner
    from job.cloud.launch_records import Launch
    from job.cloud.launching import Launcher
    from job.cloud.provider import Instance, Offer
    from job.cloud.watching import Outcome


def say(line: str) -> None:
    """Print a line to standard error, without secrets."""
    from job.text.redaction import redact

    typer.echo(redact(line), err=True)


def echo_json(value: Any, *, one_line: bool = False) -> None:
    """Print a JSON document, without secrets."""
    from job.text.redaction import redacted_json

    typer.echo(redacted_json(value, indent=None if one_line else 2))


def offer_line(offer: Offer) -> str:
    """Return an offer in one line: machine, prices, network, place."""
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


def show_plan(wanted: Launch, offer: Offer, as_json: bool) -> None:
    """Print what a launch would do with an offer; variables by name only."""
    variables = [*wanted.env, *wanted.plain_env]
    if as_json:
        shown = {"offer": offer.model_dump(mode="json"), "image": wanted.image}
        echo_json({**shown, "command": ["abliterate", *wanted.command], "variables": variables})
        return
    typer.echo(f"would rent {offer_line(offer)}")
    typer.echo(f"image: {wanted.image}")
    typer.echo(f"command: abliterate {shlex.join(wanted.command)}")
    typer.echo(f"variables: {', '.join(variables) or 'none'}")


def instance_json(platform: str, seen: Instance) -> dict[str, Any]:
    """Return an instance whose launch is not recorded here, in the form of `launch_json`."""
    return {
        "platform": platform,
        "label": seen.label or None,
        "instance": seen.id,
        "state": seen.state,
        "status": seen.status,
        "dollars": seen.dollars,
        "cost_usd": None,
        "outcome": None,
    }


def launch_json(launch: Launch, seen: Instance | None = None, outcome: Outcome | None = None) -> dict[str, Any]:
    """Return the state of a launch by its latest instance, which is None until the platform has been queried.

    `dollars` is the instance's price per hour, `cost_usd` the cost of all instances by the offers' prices.
    """
    from job.cloud.provider import Instance

    rented = launch.instances[-1]
    latest = seen if seen is not None and seen.id == rented.id else None
    shown = instance_json(launch.platform, latest or Instance(id=rented.id, state="unknown", dollars=rented.dollars))
    cost = round(launch.spent(time.time()), 2)
    return {**shown, "label": launch.label, "state": latest and latest.state, "cost_usd": cost, "outcome": outcome}


class WatchLines:
    """A watch's output for programs: one JSON object per change.

    Attributes:
        lost: The error of a line that could not be written, for the end: the machine needs its watch.
    """

    def __init__(self, launcher: Launcher) -> None:
        self._launcher = launcher
        self._seen: Instance | None = None
        self.lost: MachineError | None = None

    def show(self, seen: Instance | None, outcome: Outcome | None = None) -> None:
        """Print the launch with this state of its latest instance, or with the last one printed."""
        self._seen = seen or self._seen
        try:
            echo_json(launch_json(self._launcher.launch, self._seen, outcome), one_line=True)
        except MachineError as error:
            say(f"warning: {error.line}; the machine is still watched")
            self.lost = error


def warn_of_missing_ends(inner: Inner, offer: Offer) -> None:
    """Report the cost of forgetting the machine, before it is rented."""
    if inner.when_done is None:
        say(f"the command has no --when-done: the machine bills on after the job {_until_destroyed(offer)}")
    if inner.when_failed is None:
        say(f"the command has no --when-failed: if the job fails, the machine bills on {_until_destroyed(offer)}")


def _until_destroyed(offer: Offer) -> str:
    day = 24 * offer.dollars
    return f"until you destroy it: ${offer.dollars:.2f} an hour, ${day:.2f} a day, ${7 * day:.2f} a week"


@contextmanager
def reporting_rentals(launcher: Launcher) -> Iterator[None]:
    """Report what may bill on if a command is interrupted by an error, Ctrl-C, a kill, or a closed terminal."""
    import signal

    def leave(number: int, _frame: object) -> None:
        raise SystemExit(128 + number)

    former = {number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    except typer.Exit:
        raise  # reported already
    except BaseException:
        for line in _unended_lines(launcher):
            say(line)
        raise
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def _unended_lines(launcher: Launcher) -> list[str]:
    """Return what of a launch may still bill, and how to end it."""
    launch, market = launcher.launch, launcher.market
    command = f"abliterate cloud {launch.platform}"
    lines = [f"{market.name} instance {rented.id} MAY BILL ON" for rented in launch.left]
    lines += [f"{market.name} instance {asked.label} MAY HAVE BEEN RENTED and bill" for asked in launch.pending]
    if lines:
        lines[-1] += (
            f"; follow it with `{command} watch {launch.label}`, or end it with `{command} destroy {launch.label} "
            f"--yes` or at {market.console}"
        )
    return lines
