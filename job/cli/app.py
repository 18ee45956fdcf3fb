"""The `abliterate` command: thin, and without torch until a command needs it."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from job.cli.cloud import app as cloud_app


class PlainGroup(TyperGroup):
    """A list of commands in plain text, which needs no time to import."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the help without panels."""
        self.rich_markup_mode = None
        super().format_help(ctx, formatter)


app = typer.Typer(
    cls=PlainGroup,
    name="abliterate",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
    epilog="`abliterate COMMAND -h` lists a command's options and examples.",
)
config_app = typer.Typer(help="Settings.", no_args_is_help=True)


def _print_version(asked: bool) -> None:
    if asked:
        from job import __version__

        typer.echo(f"abliteration-job {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version and exit.")
    ] = False,
) -> None:
    """Remove a behaviour from a language model by directional ablation, as an unattended job."""


app.add_typer(config_app, name="config")
app.add_typer(cloud_app, name="cloud")
