"""What a supervised process tells its supervisor: a pipe, in which facts are lines of JSON."""

from __future__ import annotations

import os
import signal
import sys

# Names the pipe, for the supervisor's child alone.
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
            return False  # the variable has come from elsewhere: there is no such pipe
        _line = number
        _end_with_parent()
    return _line is not None


def is_supervised() -> bool:
    """Return whether a supervisor waits for this process."""
    return _line is not None


def tell(**facts: str | bool) -> None:
    """Tell the supervisor, if there is one; later facts count.

    Args:
        **facts: `job` and `workspace`, paths; `when_failed`; `hung`: the watchdog ends this process; `settled`: what
            becomes of the machine is done or decided.
    """
    if _line is None:
        return
    import json

    try:
        os.write(_line, json.dumps(facts).encode() + b"\n")
    except OSError:
        return  # it is gone, and with it whoever would want to know


def restart() -> None:
    """Replace this process by a fresh one with the same arguments, under the same supervisor."""
    if _line is not None:
        os.set_inheritable(_line, True)
        os.environ[LINE] = str(_line)
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _end_with_parent() -> None:
    """Have this process asked to stop when its supervisor is gone."""
    if sys.platform == "linux":
        import ctypes

        parent = os.getppid()
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:
            os.kill(os.getpid(), signal.SIGTERM)
