"""`status --watch`: repeat a job's status until its end."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any, TextIO

from job.errors import DeliveryError
from job.report.status import is_settled, status_text
from job.text.behaviour import words_of
from job.text.durations import duration_text
from job.text.redaction import is_gone, redact, redacted_json

# A checkpoint's status is fetched over a network that may charge for it.
HERE_SECONDS, THERE_SECONDS = 2.0, 30.0


def follow(read: Callable[[], dict[str, Any]], interval: float, *, as_json: bool, stream: TextIO | None = None) -> None:
    """Show a job's status until it is finished or has failed; it keeps waiting while a job is preempted.

    It ends early once its output is closed. A terminal is repainted; otherwise every change prints a line or JSON
    object. Raises JobError if the first reading fails, or a later one other than for an unreachable checkpoint.
    """
    stream = stream or sys.stdout
    status = read()
    if stream.isatty() and not as_json:
        _draw_live(status, read, interval, stream)
        return
    shown = None
    while True:
        if (now := _printed_fields(status)) != shown:
            shown = now
            print(redacted_json(status) if as_json else summary_line(status), file=stream, flush=True)
        if is_settled(status) or is_gone(stream):
            return
        status = _next(status, read, interval)


def _draw_live(status: dict[str, Any], read: Callable[[], dict[str, Any]], interval: float, stream: TextIO) -> None:
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    console = Console(file=stream, highlight=False)
    with Live(console=console, auto_refresh=False, vertical_overflow="visible") as live:
        while True:
            live.update(Text(redact(status_text(status, console.width))), refresh=True)
            if is_settled(status) or is_gone(stream):
                return
            status = _next(status, read, interval)


def _next(status: dict[str, Any], read: Callable[[], dict[str, Any]], interval: float) -> dict[str, Any]:
    """Return the next reading; while a checkpoint is unreachable, the previous one with a warning."""
    time.sleep(interval)
    try:
        return read()
    except DeliveryError as error:
        others = [line for line in status["warnings"] if not line.startswith("not up to date: ")]
        return {**status, "warnings": [*others, f"not up to date: {error}"]}


def _printed_fields(status: dict[str, Any]) -> object:
    """Return the parts of a status whose change is printed."""
    delivered = [(upload["target"], upload["state"]) for upload in status["uploads"]]
    names = ("state", "reason", "phase", "leading", "chosen", "warnings")
    return ([status[name] for name in names], status["trials"]["done"], delivered)


def summary_line(status: dict[str, Any]) -> str:
    """Format a status in one line."""
    trials = status["trials"]
    doing = f"{status['state']}, {status['phase']}" if status["state"] == "running" else status["state"]
    parts = [f"{doing}: {trials['done']} of {trials['target']} trials"]
    for best in status["best"]:
        if best["number"] == status["leading"]:
            values, words = best["values"], words_of(status["behaviour"])
            counted = f"{values['refusals']}/{status['search_prompts']} {words.counted}, KL {values['kl']:.4g}"
            parts.append(f"best: trial {best['number']}, {counted}")
    if status["eta_total_s"] is not None:
        parts.append(f"done in about {duration_text(status['eta_total_s'])}")
    if status["cost_usd"] is not None:
        parts.append(f"${status['cost_usd']:.2f} so far")
    if status["reason"]:
        parts.append(str(status["reason"]))
    if status["warnings"]:
        parts.append(f"warning: {status['warnings'][-1]}")
    return f"{time.strftime('%H:%M:%S')}  " + "; ".join(parts)
