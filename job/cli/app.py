"""The `abliterate` command: thin, and without torch until a command needs it."""

from __future__ import annotations

import typer

from job.cli.cloud import app as cloud_app

app = typer.Typer(
    name="abliterate",
    help="Remove a behaviour from a language model by directional ablation, as an unattended job.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
config_app = typer.Typer(help="Settings.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(config_app, name="config")
app.add_typer(cloud_app, name="cloud")
