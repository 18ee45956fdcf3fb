"""The end of `abliterate run`, `resume` and `upload`: what they print of their outcome."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import typer

from job.errors import DeliveryError, GateError
from job.text.redaction import redacted_json

if TYPE_CHECKING:
    from job.lifecycle.outcome import Outcome
    from job.storage.run_folder import RunFolder


def print_outcome(outcome: Outcome, as_json: bool = False) -> Outcome:
    """Print a run's outcome, on a terminal in a box with the next commands; exit if a gate or a target failed."""
    if as_json:
        print_json(outcome.folder, outcome.failed_targets, outcome.missed_gate)
    else:
        _print_result(outcome)
    if outcome.missed_gate is not None:
        typer.echo(f"error: {outcome.missed_gate} — the result is kept but not delivered", err=True)
        raise typer.Exit(GateError.exit_code)
    tell_failed(outcome.folder, outcome.failed_targets)
    return outcome


def print_json(folder: RunFolder, failed: Sequence[tuple[str, str]], missed_gate: str | None = None) -> None:
    """Print a job's status with what its run or delivery came to, as one JSON object."""
    from job.report.status import job_status

    came_to = {
        "report_file": str(folder.report_file),
        "missed_gate": missed_gate,
        "failed_targets": [{"target": target, "reason": reason} for target, reason in failed],
    }
    typer.echo(redacted_json({**job_status(folder, running=False), **came_to}, indent=2))


def _print_result(outcome: Outcome) -> None:
    from job.report.console import next_commands, result_lines

    base, edited, folder = outcome.base, outcome.edited, outcome.folder
    lines = [
        f"trial {outcome.chosen}: refusals {base.refusals}/{base.bad_prompts} -> "
        f"{edited.refusals}/{edited.bad_prompts}, KL {edited.kl or 0:.4g}, false refusals "
        f"{base.false_refusals}/{base.good_prompts} -> {edited.false_refusals}/{edited.good_prompts} "
        f"(on {outcome.report_prompts})",
        *result_lines(folder, edited),
        f"model:  {folder.export_link if folder.export_link.exists() else 'delivered, not in this workspace'}",
        f"report: {folder.report_file} and {folder.page_file.name}",
    ]
    _print_box(lines)
    for line in next_commands(folder.path):
        typer.echo(line)


def _print_box(lines: Sequence[str]) -> None:
    """Print lines, with a frame on a terminal."""
    if not sys.stdout.isatty():
        typer.echo("\n".join(lines))
        return
    from rich.console import Console
    from rich.panel import Panel
    from rich.text import Text

    Console().print(Panel(Text("\n".join(lines), overflow="fold"), expand=False))


def tell_failed(folder: RunFolder, failed: Sequence[tuple[str, str]]) -> None:
    """Print failed deliveries and how to retry them."""
    if not failed:
        return
    import shlex

    for target, reason in failed:
        typer.echo(f"error: {target}: {reason}", err=True)
    again = ["abliterate", "resume", "--workspace", str(folder.path.parent.absolute()), "--job", folder.path.name]
    typer.echo(f"the result is kept; to continue the delivery, run: {shlex.join(again)}", err=True)
    raise typer.Exit(DeliveryError.exit_code)
