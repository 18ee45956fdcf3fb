"""Watching a launch until it has ended, with another machine after an outbid or a dead host."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Literal

from job.cloud.api import CloudError
from job.cloud.launching import Launcher
from job.cloud.market import Instance, State

# ended: it has stopped or destroyed itself; idle: its command has ended and it bills on; halted: by the platform.
Outcome = Literal["ended", "idle", "halted"]


@dataclass
class Watch:
    """Watches the latest instance of a launch.

    Attributes:
        launcher: The launch.
        relaunches: How often another machine may be rented.
        wait_minutes: How long to wait for each.
        start_minutes: How long an instance may take to start.
        lost_minutes: How long a host may be silent.
        most_dollars: What all instances together may cost before another is rented; None: anything.
    """

    launcher: Launcher
    relaunches: int = 0
    wait_minutes: float = 60.0
    start_minutes: float = 45.0
    lost_minutes: float = 15.0
    most_dollars: float | None = None

    def until_the_end(self) -> Outcome:
        """Return how it has ended.

        Raises:
            CloudError: The platform refuses; that it is out of reach for a while is waited for.
            MachineError: No other machine is offered.
        """
        seen: State | None = None
        since = time.monotonic()
        while True:
            instance = self._look()
            if instance is not None:
                if instance.state != seen:
                    seen, since = instance.state, time.monotonic()
                    self.launcher.say(instance.line)
                why = self._lost(instance, time.monotonic() - since)
                if why is not None:
                    if not self._again(why):
                        return "halted"
                    seen, since = None, time.monotonic()
                elif instance.state in ("stopped", "gone"):
                    self.launcher.note_end(instance.state)
                    return "ended"
                elif instance.state == "exited":
                    return "idle"
            time.sleep(self.launcher.every)

    def _look(self) -> Instance | None:
        """Return the latest instance as it is, None while the platform is out of reach."""
        try:
            return self.launcher.market.instance(self.launcher.launch.instances[-1].id)
        except CloudError as error:
            if not error.passing:
                raise
            self.launcher.say(error.line)
            return None

    def _lost(self, instance: Instance, seconds: float) -> str | None:
        """Return why another machine is needed, None if it is not."""
        if instance.state == "outbid":
            return "it was outbid" if self.launcher.launch.terms.interruptible else "the platform has halted it"
        if instance.state == "lost" and seconds >= 60 * self.lost_minutes:
            return f"its host has been silent for {self.lost_minutes:.0f} minutes"
        if instance.state == "starting" and seconds >= 60 * self.start_minutes:
            return f"it has not started in {self.start_minutes:.0f} minutes"
        return None

    def _again(self, why: str) -> bool:
        """Replace the instance if that is allowed; say why not otherwise."""
        launcher = self.launcher
        spent = launcher.launch.spent(time.time())
        refusal = None
        if not launcher.launch.resumable:
            refusal = "its command has no --checkpoint, so another machine would begin anew"
        elif len(launcher.launch.instances) > self.relaunches:
            refusal = f"it was launched {len(launcher.launch.instances)} times (--relaunches {self.relaunches})"
        elif self.most_dollars is not None and spent >= self.most_dollars:
            refusal = f"it has cost ${spent:.2f} of ${self.most_dollars:.2f} (--max-total)"
        if refusal is not None:
            launcher.say(f"{why}; it is not replaced: {refusal}. What is left of it may still bill")
            return False
        launcher.replace(why, self.wait_minutes)
        return True
