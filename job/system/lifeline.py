"""Messages of a supervised process to its supervisor: JSON lines in a pipe."""

from __future__ import annotations

import os
import signal
import sys

# The pipe's descriptor, for the supervisor's child only.
LINE = "ABLITERATION_SUPERVISOR"
_PR_SET_PDEATHSIG = 1

# This process's end of the pipe, None without a supervisor.
_line: int | None = None


def adopt() -> bool:
    """Return whether this is a supervisor's child; it then ends with its supervisor, and its own children are none."""
    global _line
    given = os.environ.pop(LINE, None)
    if given is not None:
        try:
            number = int(given)
            os.set_inheritable(number, False)
        except (OSError, ValueError):
            return False  # the variable is from elsewhere: there is no such pipe
        _line = number
        _end_with_parent()
    return _line is not None


def is_supervised() -> bool:
    """Return whether a supervisor waits for this process."""
    return _line is not None


def tell(**facts: str | bool) -> None:
    """Send facts to the supervisor, if any; later ones override earlier ones.

    They are the paths `job` and `workspace`, `when_failed`, `hung` if the watchdog ends this process, and `settled` if
    the machine's end is done or decided.
    """
    if _line is None:
        return
    import json

    try:
        os.write(_line, json.dumps(facts).encode() + b"\n")
    except OSError:
        return  # the supervisor is gone


def restart() -> None:
    """Replace this process by a fresh one with the same arguments and supervisor."""
    if _line is not None:
        os.set_inheritable(_line, True)
        os.environ[LINE] = str(_line)
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _end_with_parent() -> None:
    if sys.platform == "linux":
        import ctypes

        parent = os.getppid()
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:
            os.kill(os.getpid(), signal.SIGTERM)
