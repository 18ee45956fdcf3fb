"""Watching a launch until it has ended, with another machine after an outbid or a dead host."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Literal

from job.cloud.api import CloudError
from job.cloud.destroying import BY_HAND
from job.cloud.launching import Launcher
from job.cloud.provider import PROVISIONING, Instance, State
from job.cloud.termination import APPEAR_SECONDS

# ended: it is gone; idle: its command has ended and it bills on; halted: by the platform;
# stopped: by somebody, and its disk bills on; missing: it was rented and the platform has never shown it.
Outcome = Literal["ended", "stopped", "idle", "halted", "missing"]
# Platforms answer from copies that lag behind: one answer is not enough for anything that cannot be taken back.
_LOOKS = 3


@dataclass
class _Track:
    """What was seen of one instance.

    Attributes:
        id: Which.
        state: Its last state.
        since: When that was seen first, by the monotonic clock.
        looks: How often it has been seen since, without another between.
        states: All that have been seen.
        gaps: The platform was out of reach for a while: it may have done anything then.
        told: Minutes of an unknown status that were told of last.
        begun: Unix time of the first look.
    """

    id: str
    state: State | None = None
    since: float = 0.0
    looks: int = 0
    states: set[State] = field(default_factory=set)
    gaps: bool = False
    told: float = 0.0
    begun: float = field(default_factory=time.time)

    def note(self, instance: Instance) -> bool:
        """Count a look; return whether the state is another than before."""
        changed = instance.state != self.state
        if changed:
            self.state, self.since, self.looks, self.told = instance.state, time.monotonic(), 0, 0.0
        self.looks += 1
        at_first = self.states <= {"starting", "gone"} and instance.status == PROVISIONING
        self.states.add("starting" if at_first else instance.state)
        return changed

    @property
    def minutes(self) -> float:
        return (time.monotonic() - self.since) / 60

    @property
    def never_ran(self) -> bool:
        return not self.gaps and self.states <= {"starting", "gone"}


@dataclass
class Watch:
    """Watches the latest instance of a launch.

    Only a status that the platform documents, seen in several looks, leads to anything. Whatever is to be destroyed is
    gone when a watch returns or fails.

    Attributes:
        launcher: The launch.
        relaunches: How often another machine may be rented.
        wait_minutes: How long to wait for each.
        start_minutes: How long an instance may take to start.
        lost_minutes: How long a host may be silent.
        appear_minutes: How long an instance that was just rented may be unknown to the platform.
        unknown_minutes: How often to tell of a status that is unknown.
        most_dollars: What all instances together may cost before another is rented; None: anything.
    """

    launcher: Launcher
    relaunches: int = 0
    wait_minutes: float = 60.0
    start_minutes: float = 45.0
    lost_minutes: float = 15.0
    appear_minutes: float = APPEAR_SECONDS / 60
    unknown_minutes: float = 15.0
    most_dollars: float | None = None

    def until_the_end(self) -> Outcome:
        """Return how it has ended.

        Raises:
            CloudError: The platform refuses; that it is out of reach for a while is waited for.
            MachineError: No other machine is offered.
        """
        try:
            outcome = self._follow()
        except Exception:  # any of them; an interrupt is no Exception, and is not kept waiting for a machine's end
            self.launcher.destroyer.finish()
            raise
        self.launcher.destroyer.finish()
        return outcome

    def _follow(self) -> Outcome:
        track = _Track("")
        last = self.launcher.launch.instances[-1]
        # A watch was cut off while it replaced this one.
        why = last.ending or (last.why if last.ended is not None else "")
        if why not in ("", "gone", "stopped", BY_HAND) and not self._again(why, track):
            return "halted"
        while True:
            self.launcher.destroyer.press_on()
            self.launcher.look_for_late_ones()
            latest = self.launcher.launch.instances[-1].id
            if latest != track.id:
                track = _Track(latest)
            instance = self._look()
            if instance is None:
                track.gaps = True
            else:
                if track.note(instance):
                    self.launcher.say(instance.line)
                if instance.state != "gone":
                    self.launcher.destroyer.saw(instance.id)
                outcome = self._judge(instance, track)
                if outcome is not None:
                    return outcome
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

    def _judge(self, instance: Instance, track: _Track) -> Outcome | None:
        """Return how the watch ends, None if it goes on, perhaps with another instance."""
        if instance.state == "unknown":
            self._tell_of_unknown(instance, track)
        if track.looks < _LOOKS:
            return None
        why = self._lost(instance, track.minutes)
        if why is not None:
            return None if self._again(why, track) else "halted"
        if instance.state == "gone":
            return self._gone(instance, track)
        if instance.state == "stopped":
            return "stopped"
        return "idle" if instance.state == "exited" else None

    def _tell_of_unknown(self, instance: Instance, track: _Track) -> None:
        if track.minutes >= max(self.unknown_minutes, 2 * track.told):
            track.told = track.minutes
            self.launcher.say(
                f"instance {instance.id} has had no known status for {track.minutes:.0f} minutes ({instance.status}): "
                f"it is left alone and MAY BILL ON; look at {self.launcher.market.console}"
            )

    def _gone(self, instance: Instance, track: _Track) -> Outcome | None:
        """Return how a watch of an instance ends that the platform does not know, None if it may still appear."""
        rented = self.launcher.launch.instances[-1]
        young = time.time() - rented.at < 60 * self.appear_minutes
        never_seen = track.states == {"gone"} and not rented.seen
        if (young and never_seen) or self._listed(instance.id):
            return None
        if never_seen and track.begun - rented.at < 60 * self.appear_minutes:
            self.launcher.say(
                f"instance {instance.id} was rented and has not appeared in {self.appear_minutes:.0f} minutes. If it "
                f"does, it BILLS: look at {self.launcher.market.console}"
            )
            return "missing"
        self.launcher.record.note_end("gone")
        return "ended"

    def _listed(self, id: str) -> bool:
        """Return whether the list of all instances still has it, or cannot be had."""
        try:
            return any(other.id == id and other.state != "gone" for other in self.launcher.market.instances())
        except CloudError as error:
            self.launcher.say(error.line)
            return True

    def _lost(self, instance: Instance, minutes: float) -> str | None:
        """Return why another machine is needed, None if it is not."""
        if instance.state == "outbid":
            return "it was outbid" if self.launcher.launch.terms.interruptible else "the platform has halted it"
        if instance.state == "lost" and minutes >= self.lost_minutes:
            return f"its host has been silent for {self.lost_minutes:.0f} minutes"
        if instance.state == "starting" and minutes >= self.start_minutes:
            said = f": {instance.note}" if instance.note else ""
            return f"it has not started in {self.start_minutes:.0f} minutes{said}"
        return None

    def _again(self, why: str, track: _Track) -> bool:
        """Replace the instance if that is allowed; say why not otherwise."""
        launcher = self.launcher
        launch = launcher.launch
        spent = launch.spent(time.time())
        # Watched from its beginning, it has done nothing that could be lost.
        nothing_lost = track.never_ran and launch.instances[-1].id in launcher.here
        refusal = None
        if not launch.instances[-1].sure:
            refusal, nothing_lost = "it is not certain that it is this launch's", False
        elif not launch.resumable and not nothing_lost:
            refusal = "its command has no --checkpoint off the machine, so another machine would begin anew"
        elif len(launch.instances) > self.relaunches:
            refusal = f"it was launched {len(launch.instances)} times (--relaunches {self.relaunches})"
        elif self.most_dollars is not None and spent >= self.most_dollars:
            refusal = f"it has cost ${spent:.2f} of ${self.most_dollars:.2f} (--max-total)"
        if refusal is None:
            launcher.replace(why, self.wait_minutes)
            return True
        if nothing_lost:
            launcher.say(f"{why}; it is destroyed, since nothing has run there, and not replaced: {refusal}")
            launcher.destroyer.close(why, launcher.ending_seconds)
        else:
            launcher.say(
                f"{why}; it is not replaced: {refusal}. What is left of it may still bill: look at "
                f"{launcher.market.console}"
            )
        return False
