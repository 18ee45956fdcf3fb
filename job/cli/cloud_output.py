"""Lines that `abliterate cloud` prints about offers, launches and what may bill on."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from job.cloud.inner_command import Inner
    from job.cloud.launch_records import Launch
    from job.cloud.launching import Launcher
    from job.cloud.provider import Offer


def say(line: str) -> None:
    """Print a line to standard error, without secrets."""
    from job.text.redaction import redact

    typer.echo(redact(line), err=True)


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


def plan_lines(wanted: Launch, offer: Offer) -> Iterator[str]:
    """Yield what a launch would do with an offer; variables by name only."""
    yield f"would rent {offer_line(offer)}"
    yield f"image: {wanted.image}"
    yield f"command: abliterate {shlex.join(wanted.command)}"
    yield f"variables: {', '.join((*wanted.env, *wanted.plain_env)) or 'none'}"


def warn_of_missing_ends(inner: Inner, offer: Offer) -> None:
    """Report the cost of forgetting the machine, before it is rented."""
    if inner.when_done is None:
        say(f"the command has no --when-done: the machine bills on after the job {_until_destroyed(offer)}")
    if inner.when_failed is None:
        say(f"the command has no --when-failed: if the job fails, the machine bills on {_until_destroyed(offer)}")


def _until_destroyed(offer: Offer) -> str:
    day = 24 * offer.dollars
    return f"until you destroy it: ${offer.dollars:.2f} an hour, ${day:.2f} a day, ${7 * day:.2f} a week"


def unended_lines(launcher: Launcher) -> list[str]:
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
