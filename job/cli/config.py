"""`abliterate config show`."""

from __future__ import annotations

from typing import Any

import typer

from job.cli.app import config_app
from job.cli.options import (
    takes_settings,
)


@config_app.command("show")
@takes_settings
def config_show(given: dict[str, Any]) -> None:
    """Print every setting with its value and its source."""
    from job.config.describe import describe_settings
    from job.data.sources import parse_source

    settings, lines = describe_settings(**given)
    for name, source in settings.prompt_sets().items():
        lines.append(f"# {name}: {parse_source(source).describe()}")
    typer.echo("\n".join(lines))
