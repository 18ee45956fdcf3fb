"""The command line; failures become one line and an exit code."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import cache
from typing import Any, NoReturn

# The commands, in the order of `abliterate --help`.
# isort: off
from job.cli import run as _run, jobs as _jobs, talk as _talk, evaluate as _evaluate  # noqa: F401
from job.cli import export as _export, models as _models, config as _config  # noqa: F401

# isort: on
import typer
from typer.main import get_command

from job.cli.app import app
from job.errors import JobError, RestartNeeded, Stopped
from job.lifecycle.supervisor import supervised
from job.system.lifeline import restart
from job.text.redaction import guarded_output


def main() -> None:
    """Run the command line and turn expected failures into a line and an exit code."""
    supervised()
    with guarded_output():
        _run_command_line()


def _run_command_line() -> None:
    arguments = sys.argv[1:]
    if arguments[:1] == ["abliterate"]:  # `docker run IMAGE abliterate run` equals `docker run IMAGE run`
        arguments = arguments[1:]
    try:
        _call(arguments or ["--help"])
    except JobError as error:
        print(f"error: {error.line}", file=sys.stderr)
        sys.exit(error.exit_code)
    except Stopped as stop:
        print(f"stopped by {stop}; run the same command again to continue", file=sys.stderr)
        sys.exit(stop.exit_code)
    except RestartNeeded:
        sys.stdout.flush()
        sys.stderr.flush()
        restart()
    except KeyboardInterrupt:
        sys.exit(130)
    except ModuleNotFoundError as error:
        _end_without_module(error)
    except Exception:  # any unforeseen error: its traceback may quote a secret, which is masked
        _end_by_surprise()


def _end_without_module(error: ModuleNotFoundError) -> NoReturn:
    from job.system.extras import explained

    missing = explained(error)
    if missing is None:
        _end_by_surprise()
    print(f"error: {missing.line}", file=sys.stderr)
    sys.exit(missing.exit_code)


def _end_by_surprise() -> NoReturn:
    import traceback

    sys.stderr.write(traceback.format_exc())
    sys.exit(1)


@cache
def _commands() -> Any:
    """Return the parser; calling `app` itself would build it again for each command line of a process."""
    return get_command(app)


def _call(arguments: Sequence[str]) -> None:
    try:
        code = _commands()(args=arguments, prog_name="abliterate", standalone_mode=False)
    except typer.Abort:  # Ctrl-C or Ctrl-D at a question
        sys.stderr.write("aborted\n")
        sys.exit(1)
    except Exception as error:
        show = getattr(error, "show", None)  # of the parser's own errors, whose class is not public
        if show is None or not hasattr(error, "exit_code"):
            raise
        show()
        sys.exit(error.exit_code)
    else:
        if code:
            sys.exit(code)
    finally:
        sys.stdout.flush()  # what the interpreter could not write on exit would show as its complaint
