"""`abliterate config show`."""

from __future__ import annotations

from typing import Any

import typer

from job.cli.app import config_app
from job.cli.help import examples
from job.cli.options import (
    AsJson,
    takes_settings,
)
from job.text.redaction import redacted_json


@config_app.command("show", epilog=examples("config show"))
@takes_settings
def config_show(given: dict[str, Any], as_json: AsJson = False) -> None:
    """Print every setting with its value and its source."""
    from job.config.describe import describe_settings, settings_table
    from job.data.sources import parse_source

    if as_json:
        typer.echo(redacted_json(settings_table(**given), indent=2))
        return
    settings, lines = describe_settings(**given)
    for name, source in settings.prompt_sets().items():
        lines.append(f"# {name}: {parse_source(source).describe()}")
    typer.echo("\n".join(lines))
