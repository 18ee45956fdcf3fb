"""Entry point of `abliterate`: starts the supervisor before anything large is loaded."""

from __future__ import annotations

from job.lifecycle.supervisor import supervised


def main() -> None:
    """Run the command line, supervised if ending a rental depends on it."""
    supervised()
    from job.cli.main import main as command_line

    command_line()


if __name__ == "__main__":
    main()
