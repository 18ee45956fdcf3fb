"""The `abliterate` command."""

from job.cli.main import main

__all__ = ["main"]
