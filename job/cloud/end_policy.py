"""Policy for ends of rentals: a pure function decides whether to stop or destroy the machine.

`docs/ends-of-rentals.md` lists every case.
"""

from __future__ import annotations

import signal
from dataclasses import dataclass
from typing import Literal

Action = Literal["nothing", "stop", "destroy"]
ACTIONS: tuple[Action, ...] = ("nothing", "stop", "destroy")

_HELD, _PREEMPTED = 4, 75
# Usage errors and preflight refusals: nothing was computed, so nothing is proved about this machine.
_REFUSED = (2, 3, 76)
# Signals by which platforms and people stop a process.
_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
_INTERRUPTED = 130


@dataclass(frozen=True)
class Ended:
    """How a start ended.

    Attributes:
        code: Exit code; a negative one is the signal that killed the process.
        elsewhere: With exit code 4: the holder runs on another machine.
    """

    code: int
    elsewhere: bool = False
    hung: bool = False
    signalled: bool = False

    @property
    def preempted(self) -> bool:
        """Whether it was asked to stop, and continues when started again."""
        if self.hung:
            return False
        stopped = self.code in (_PREEMPTED, _INTERRUPTED) or -self.code in _STOP_SIGNALS
        return stopped or (self.signalled and self.code < 0)

    @property
    def in_words(self) -> str:
        """The end in words."""
        if self.hung:
            return "a forward pass has hung"
        if self.code < 0:
            return f"the process was killed by {_name(-self.code)}"
        return f"the command ended with exit code {self.code}"


@dataclass(frozen=True)
class AskedEnds:
    """The requested ends: `--when-done` and `--when-failed`."""

    when_done: Action = "nothing"
    when_failed: Action = "nothing"


@dataclass(frozen=True)
class Safety:
    """Reasons against an end in words, or ""."""

    others: str = ""
    held: str = ""
    unsaved: str = ""


SAFE = Safety()


@dataclass(frozen=True)
class Decision:
    """The action on the machine, its reason, and the requested action."""

    action: Action
    reason: str
    asked: Action

    @property
    def reduced(self) -> bool:
        """Whether less is done than requested."""
        return self.action != self.asked


def ending(outcome: Ended, asked: AskedEnds, safety: Safety) -> Decision:
    """Decide what to do with a rented machine after a start has ended."""
    wanted, why = _requested_end(outcome, asked)
    if wanted == "nothing":
        return Decision("nothing", why, wanted)
    if safety.others:
        return Decision("nothing", safety.others, wanted)
    if safety.held and not outcome.elsewhere:
        return Decision("nothing", safety.held, wanted)
    if wanted == "stop":
        return Decision("stop", why, wanted)
    if outcome.code in _REFUSED:
        return Decision("stop", f"{why}, which is no reason to destroy the machine", wanted)
    if safety.unsaved:
        return Decision("stop", safety.unsaved, wanted)
    return Decision("destroy", why, wanted)


def _requested_end(outcome: Ended, asked: AskedEnds) -> tuple[Action, str]:
    if outcome.preempted:
        return "nothing", "the job was stopped by request and continues when it is started again"
    if outcome.code == 0:
        return asked.when_done, "the job is delivered"
    if outcome.code == _HELD:
        if outcome.elsewhere:
            return asked.when_done, "another machine has taken the job over"
        return "nothing", "another process on this machine holds the job"
    return asked.when_failed, outcome.in_words


def _name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
