"""Destroy an instance until it is seen to be gone: a forgotten machine bills on."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from job.cloud.provider import Instance, Market
from job.errors import JobError

# Time in which a new instance unknown to the platform may still appear: lists lag behind.
APPEAR_SECONDS = 600.0
_LOUD_TRIES = 3


@dataclass
class Termination:
    """An instance to destroy, and progress so far.

    Attributes:
        rented: Unix time of the rental, 0 if long ago or unknown.
        seen: The platform has listed it, so "no such instance" means that it is gone.
        pause: Seconds until the next attempt; doubles.
    """

    market: Market
    id: str
    say: Callable[[str], None]
    rented: float = 0.0
    seen: bool = False
    pause: float = 5.0
    longest: float = 60.0
    tries: int = 0
    _next: float = field(default=0.0, repr=False)

    def press(self) -> bool:
        """Request the end if due; return whether the instance is gone."""
        if time.monotonic() < self._next:
            return False
        self.tries += 1
        problem = self._attempt()
        if problem is None:
            return True
        self._next = time.monotonic() + self.pause
        if problem:
            self.say(
                f"INSTANCE {self.id} COULD NOT BE DESTROYED and BILLS ON: {problem}. Trying again in "
                f"{self.pause:.0f} s until it is gone; or end it by hand at {self.market.console}"
            )
        self.pause = min(2 * self.pause, self.longest)
        return False

    def insist(self, seconds: float | None = None) -> bool:
        """Repeat until the instance is gone or `seconds` have passed; return whether it is."""
        deadline = None if seconds is None else time.monotonic() + seconds
        while not self.press():
            if deadline is not None and time.monotonic() >= deadline:
                return False
            until = self._next if deadline is None else min(self._next, deadline)
            time.sleep(max(until - time.monotonic(), 0.0))
        return True

    def _attempt(self) -> str | None:
        """Return None if it is gone, "" if that takes time, else why it could not be ended."""
        try:
            self.seen |= self.market.end(self.id, "destroy")
            found = self.market.instance(self.id)
        except JobError as error:
            return error.line
        if found.state != "gone":
            return self._still_there(found)
        if self.seen or time.time() - self.rented >= APPEAR_SECONDS:
            return None
        if self.tries == 1:
            self.say(f"{self.market.name} does not list instance {self.id} yet; it is destroyed as soon as it appears")
        return ""

    def _still_there(self, found: Instance) -> str:
        self.seen = True
        shown = f"the platform accepted the request and still lists it as {found.status or found.state}"
        if self.tries >= _LOUD_TRIES:
            return shown
        self.say(f"instance {self.id}: {shown}; checking again in {self.pause:.0f} s")
        return ""
