"""Destroy the instances of a launch, each until it is seen to be gone."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from job.cloud.launch_records import LaunchFile, Rented
from job.cloud.provider import Market
from job.cloud.termination import Termination

BY_HAND = "destroyed by hand"
# Time that a replacement waits for the end of the last instance, which is then pursued in parallel.
ENDING_SECONDS = 300.0


@dataclass
class Destroyer:
    """Destroys instances of a launch, checking every `every` seconds, and records their end."""

    market: Market
    record: LaunchFile
    say: Callable[[str], None]
    every: float
    _terminations: dict[str, Termination] = field(default_factory=dict, repr=False)

    def close(self, why: str, seconds: float = ENDING_SECONDS) -> None:
        """Destroy the latest instance; after a time limit, `press_on` and `finish` continue."""
        last = self.record.launch.instances[-1]
        if last.ended is not None:
            return
        self.record.change(last, ending=why)
        self._note(self._termination(last).insist(seconds), last.id)

    def press_on(self) -> None:
        """Repeat due requests without waiting."""
        for rented in self.record.launch.left:
            if rented.ending:
                self._note(self._termination(rented).press(), rented.id)

    def finish(self) -> None:
        """Return once all instances to destroy are gone."""
        while any(rented.ending for rented in self.record.launch.left):
            self.press_on()
            time.sleep(min(self.every, 0.5))

    def destroy(self, ids: Sequence[str]) -> None:
        """Destroy instances of this launch, and return once all are gone."""
        for rented in self.record.launch.left:
            if rented.id in ids:
                self.record.change(rented, ending=rented.ending or BY_HAND)
        self.finish()

    def saw(self, id: str) -> None:
        """Record that the platform has listed an instance."""
        for rented in self.record.launch.left:
            if rented.id == id and not rented.seen:
                self.record.change(rented, seen=True)
                self._termination(rented).seen = True

    def _termination(self, rented: Rented) -> Termination:
        fresh = Termination(
            self.market,
            rented.id,
            self.say,
            rented=rented.at,
            seen=rented.seen,
            pause=min(self.every, 5.0),
            longest=min(2 * self.every, 60.0),
        )
        return self._terminations.setdefault(rented.id, fresh)

    def _note(self, gone: bool, id: str) -> None:
        rented = next(rented for rented in self.record.launch.instances if rented.id == id)
        if gone and rented.ended is None:
            self.record.change(rented, ended=time.time(), why=rented.ending, ending="")
            self.say(f"destroyed instance {id}: {rented.ending}")
