"""Print a survey: a table, failures last, and the plan."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from job.preflight.checks import is_allowed, size
from job.preflight.survey import Survey
from job.text.redaction import redact

_STYLES = {"ok": "green", "warn": "yellow", "fail": "bold red"}


def show(survey: Survey, console: Console | None = None) -> None:
    """Print a survey."""
    console = console or Console(highlight=False)
    table = Table(box=None, pad_edge=False)
    for heading in ("", "check", "measured", "needed"):
        table.add_column(heading, overflow="fold")
    order = ("ok", "warn", "fail")
    for check in sorted(survey.checks, key=lambda check: order.index(check.status)):
        allowed = check.status == "fail" and is_allowed(check, survey.allowed)
        status = "allowed" if allowed else check.status
        style = "yellow" if allowed else _STYLES[check.status]
        # As text: measured values may hold brackets, which are no markup. Redacted before lines are broken.
        measured, needed = Text(redact(check.measured)), Text(redact(check.needed))
        table.add_row(Text(status, style=style), Text(check.name), measured, needed)
        if check.remedy:
            table.add_row("", "", Text(f"→ {redact(check.remedy)}", style=style), "")
    console.print(table)
    if survey.plan is not None:
        console.print(Text(redact("plan: " + "; ".join(survey.plan.settings))))
        if (descent := survey.plan.gradient) is not None and descent.rows:
            console.print(Text(f"gradient: {descent.rows} prompts a forward pass, {size(descent.row_bytes)} each"))
    if survey.offers is not None:
        console.print(Text(f"offers: {survey.offers}"), soft_wrap=True)
    console.print(Text(f"preflight: {survey.summary}"))
