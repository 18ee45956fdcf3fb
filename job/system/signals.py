"""SIGTERM, SIGINT and SIGHUP: stop at once where that is safe, otherwise right after what must not be cut."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from job.errors import Stopped
from job.system.lifeline import is_supervised

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_AGAIN_SECONDS = 0.05
# Time in which a second signal counts as the first, forwarded by a supervisor.
_SAME_SECONDS = 1.0


class StopSignals:
    """Turns the first signal into `Stopped`; the second leaves the process at once.

    A terminal that is closed sends SIGHUP more than once, and under `nohup` it is ignored.

    Everything on disk is consistent at any instant (a stronger signal may come at any time), so
    `Stopped` may be raised anywhere; `shielded` merely keeps short writes in one piece. Where Python
    swallows what is raised (finalizers, callbacks of weak references), it is raised again a moment later. `graceful`
    blocks get some time to end by themselves.
    """

    def __init__(self) -> None:
        self._pending: str | None = None
        self._shields = 0
        self._grace = 0.0
        self._since = -_SAME_SECONDS
        self._installed = False

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Handle the signals within the block, then restore the former handlers."""
        ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        handled = [number for number in SIGNALS if not (ignored and number == signal.SIGHUP)]
        former = {number: signal.signal(number, self._handle) for number in handled}
        former[signal.SIGALRM] = signal.signal(signal.SIGALRM, self._raise_again)
        former_hook, sys.unraisablehook = sys.unraisablehook, self._unraisable
        self._installed = True
        try:
            yield
        finally:
            self._installed = False
            signal.setitimer(signal.ITIMER_REAL, 0)
            sys.unraisablehook = former_hook
            if self._pending and is_supervised():
                # The same request, forwarded a moment later, must not change the exit code of a process that obeys.
                former |= dict.fromkeys(SIGNALS, signal.SIG_IGN)
            for number, handler in former.items():
                signal.signal(number, handler)

    @contextmanager
    def shielded(self) -> Iterator[None]:
        """Defer a stop until the end of the block; one being obeyed is not raised again."""
        obeyed = self._pending is not None and not self._grace
        self._shields += 1
        try:
            yield
        finally:
            self._shields -= 1
        if self._pending and not self._shields and not self._grace and not obeyed:
            raise Stopped(self._pending)

    @contextmanager
    def graceful(self, seconds: float) -> Iterator[None]:
        """Let the block end by itself within `seconds` after a stop."""
        self._grace = seconds
        try:
            yield
        finally:
            self._grace = 0.0
            signal.setitimer(signal.ITIMER_REAL, 0)
        if self._pending:
            raise Stopped(self._pending)

    def interrupt(self, reason: str) -> None:
        """Stop the main thread from another thread, as a signal would."""
        self._pending = self._pending or reason
        if self._installed:  # otherwise the signal would end the process; `check` raises
            os.kill(os.getpid(), signal.SIGALRM)

    def _unraisable(self, unraisable: sys.UnraisableHookArgs) -> None:
        if isinstance(unraisable.exc_value, Stopped):
            signal.setitimer(signal.ITIMER_REAL, _AGAIN_SECONDS)
        else:
            sys.__unraisablehook__(unraisable)

    def _raise_again(self, _number: int, _frame: FrameType | None) -> None:
        self._grace = 0.0  # the grace period is over
        if self._pending and not self._shields:  # within a shield, its end raises
            raise Stopped(self._pending)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if self._pending:
            if number == signal.SIGHUP:
                return
            if is_supervised() and time.monotonic() - self._since < _SAME_SECONDS:
                return  # one request sent to the process group, and forwarded as well
            os._exit(Stopped.exit_code)
        self._pending, self._since = name, time.monotonic()
        if self._grace:
            signal.setitimer(signal.ITIMER_REAL, self._grace)
        elif not self._shields:
            raise Stopped(name)
