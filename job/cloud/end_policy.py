"""The policy for ends of rentals: what becomes of the machine, decided by one pure function.

`docs/ends-of-rentals.md` lists every case.
"""

from __future__ import annotations

import signal
from dataclasses import dataclass
from typing import Literal

Action = Literal["nothing", "stop", "destroy"]
ACTIONS: tuple[Action, ...] = ("nothing", "stop", "destroy")

_HELD, _PREEMPTED = 4, 75
# Bad usage or settings, and what preflight refuses with: nothing was computed, so nothing is proved about this machine.
_REFUSED = (2, 3, 76)
# By which platforms and people ask a process to end.
_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
_INTERRUPTED = 130


@dataclass(frozen=True)
class Ended:
    """How a start has ended.

    Attributes:
        code: Exit code; negative: the signal that killed the process.
        elsewhere: Exit code 4: the holder runs on another machine.
        hung: The watchdog ended it.
        signalled: A stop signal was passed on to it before.
    """

    code: int
    elsewhere: bool = False
    hung: bool = False
    signalled: bool = False

    @property
    def preempted(self) -> bool:
        """Whether somebody asked it to end; it continues when it is started again."""
        if self.hung:
            return False
        stopped = self.code in (_PREEMPTED, _INTERRUPTED) or -self.code in _STOP_SIGNALS
        return stopped or (self.signalled and self.code < 0)

    @property
    def in_words(self) -> str:
        """How it ended, for people."""
        if self.hung:
            return "a forward has hung"
        if self.code < 0:
            return f"the process was killed by {_name(-self.code)}"
        return f"the command has ended with exit code {self.code}"


@dataclass(frozen=True)
class AskedEnds:
    """What was asked for: `--when-done` and `--when-failed`."""

    when_done: Action = "nothing"
    when_failed: Action = "nothing"


@dataclass(frozen=True)
class Safety:
    """What speaks against an end, in words; "" where nothing does.

    Attributes:
        others: Another job in the workspace is not delivered.
        held: Another process or machine holds this job.
        unsaved: What must survive the machine and was not found off it just now.
    """

    others: str = ""
    held: str = ""
    unsaved: str = ""


SAFE = Safety()


@dataclass(frozen=True)
class Decision:
    """What becomes of the machine.

    Attributes:
        action: What is done.
        reason: Why that and no more, for people.
        asked: What was asked for.
    """

    action: Action
    reason: str
    asked: Action

    @property
    def reduced(self) -> bool:
        """Whether less is done than was asked for."""
        return self.action != self.asked


def ending(outcome: Ended, asked: AskedEnds, safety: Safety) -> Decision:
    """Decide what becomes of a rented machine after a start has ended.

    Args:
        outcome: How the start has ended.
        asked: What was asked for.
        safety: What speaks against it.
    """
    wanted, why = _wanted(outcome, asked)
    if wanted == "nothing":
        return Decision("nothing", why, wanted)
    if safety.others:
        return Decision("nothing", safety.others, wanted)
    if safety.held and not outcome.elsewhere:
        return Decision("nothing", safety.held, wanted)
    if wanted == "stop":
        return Decision("stop", why, wanted)
    if outcome.code in _REFUSED:
        return Decision("stop", f"{why}: that destroys no machine", wanted)
    if safety.unsaved:
        return Decision("stop", safety.unsaved, wanted)
    return Decision("destroy", why, wanted)


def _wanted(outcome: Ended, asked: AskedEnds) -> tuple[Action, str]:
    """Return what was asked for such an end, and why it applies."""
    if outcome.preempted:
        return "nothing", "it was asked to stop: it continues when it is started again"
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
