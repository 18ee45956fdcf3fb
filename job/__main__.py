"""The entry point of `abliterate`: a supervisor has to be there before anything large is loaded."""

from __future__ import annotations

from job.lifecycle.supervisor import supervised


def main() -> None:
    """Run the command line, in a supervised child where the end of a rental depends on it."""
    supervised()
    from job.cli.main import main as command_line

    command_line()


if __name__ == "__main__":
    main()
