"""Watch a launch until its end, replacing machines that were outbid or lost."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from job.cloud.api import CloudError
from job.cloud.destroying import BY_HAND
from job.cloud.launching import Launcher
from job.cloud.provider import PROVISIONING, Instance, State
from job.cloud.termination import APPEAR_SECONDS

# ended: gone; idle: its command ended and it bills on; halted: by the platform; stopped: by someone, its disk bills on;
# missing: rented but never listed by the platform.
Outcome = Literal["ended", "stopped", "idle", "halted", "missing"]
# Platforms answer from stale copies: irreversible actions need more than one answer.
_LOOKS = 3


@dataclass
class _Track:
    """Observations of one instance.

    Attributes:
        since: Monotonic time of that state's first observation.
        looks: Consecutive observations of it.
        gaps: The platform was unreachable for a while, in which anything may have happened.
        told: Minutes of unknown status at the last report.
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
        """Record an observation; return whether the state changed."""
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

    It acts only on documented statuses seen in several looks. When a watch returns or fails, instances to destroy are
    gone.

    Attributes:
        start_minutes: Time in which an instance must start.
        lost_minutes: Time that a host may be silent.
        appear_minutes: Time in which a new instance must be listed.
        unknown_minutes: Interval of reports on an unknown status.
        most_dollars: Most dollars of all instances before another is rented; None: no limit.
        on_change: Receives the instance at each change of its state.
    """

    launcher: Launcher
    relaunches: int = 0
    wait_minutes: float = 60.0
    start_minutes: float = 45.0
    lost_minutes: float = 15.0
    appear_minutes: float = APPEAR_SECONDS / 60
    unknown_minutes: float = 15.0
    most_dollars: float | None = None
    on_change: Callable[[Instance], None] = lambda _: None

    def until_the_end(self) -> Outcome:
        """Return the final outcome, waiting for an unreachable platform. Raises CloudError or MachineError."""
        try:
            outcome = self._follow()
        except Exception:  # an interrupt is no Exception, and does not wait for a machine's end
            self.launcher.destroyer.finish()
            raise
        self.launcher.destroyer.finish()
        return outcome

    def _follow(self) -> Outcome:
        track = _Track("")
        last = self.launcher.launch.instances[-1]
        # A watch was interrupted while replacing this one.
        why = last.ending or (last.why if last.ended is not None else "")
        if why not in ("", "gone", "stopped", BY_HAND) and not self._again(why, track):
            return "halted"
        while True:
            self.launcher.destroyer.press_on()
            self.launcher.look_for_late_ones()
            latest = self.launcher.launch.instances[-1].id
            if latest != track.id:
                track = _Track(latest)
            instance = self._poll_instance()
            if instance is None:
                track.gaps = True
            else:
                if track.note(instance):
                    self.launcher.say(instance.line)
                    self.on_change(instance)
                if instance.state != "gone":
                    self.launcher.destroyer.saw(instance.id)
                outcome = self._judge(instance, track)
                if outcome is not None:
                    return outcome
            time.sleep(self.launcher.every)

    def _poll_instance(self) -> Instance | None:
        """Return the latest instance, None while the platform is unreachable."""
        try:
            return self.launcher.market.instance(self.launcher.launch.instances[-1].id)
        except CloudError as error:
            if not error.passing:
                raise
            self.launcher.say(error.line)
            return None

    def _judge(self, instance: Instance, track: _Track) -> Outcome | None:
        """Return the watch's outcome, None if it continues, perhaps with another instance."""
        if instance.state == "unknown":
            self._report_unknown_status(instance, track)
        if track.looks < _LOOKS:
            return None
        why = self._why_lost(instance, track.minutes)
        if why is not None:
            return None if self._again(why, track) else "halted"
        if instance.state == "gone":
            return self._outcome_if_gone(instance, track)
        if instance.state == "stopped":
            return "stopped"
        return "idle" if instance.state == "exited" else None

    def _report_unknown_status(self, instance: Instance, track: _Track) -> None:
        if track.minutes >= max(self.unknown_minutes, 2 * track.told):
            track.told = track.minutes
            self.launcher.say(
                f"instance {instance.id} has had no known status for {track.minutes:.0f} minutes ({instance.status}): "
                f"it is left alone and MAY BILL ON; check {self.launcher.market.console}"
            )

    def _outcome_if_gone(self, instance: Instance, track: _Track) -> Outcome | None:
        """Return the outcome for an instance unknown to the platform, None if it may still appear."""
        rented = self.launcher.launch.instances[-1]
        young = time.time() - rented.at < 60 * self.appear_minutes
        never_seen = track.states == {"gone"} and not rented.seen
        if (young and never_seen) or self._listed(instance.id):
            return None
        if never_seen and track.begun - rented.at < 60 * self.appear_minutes:
            self.launcher.say(
                f"instance {instance.id} was rented and has not appeared in {self.appear_minutes:.0f} minutes. If it "
                f"appears, it BILLS: check {self.launcher.market.console}"
            )
            return "missing"
        self.launcher.record.note_end("gone")
        return "ended"

    def _listed(self, id: str) -> bool:
        """Return whether the list of instances still has it, or is unavailable."""
        try:
            return any(other.id == id and other.state != "gone" for other in self.launcher.market.instances())
        except CloudError as error:
            self.launcher.say(error.line)
            return True

    def _why_lost(self, instance: Instance, minutes: float) -> str | None:
        if instance.state == "outbid":
            return (
                "the instance was outbid"
                if self.launcher.launch.terms.interruptible
                else "the platform halted the instance"
            )
        if instance.state == "lost" and minutes >= self.lost_minutes:
            return f"its host has been silent for {self.lost_minutes:.0f} minutes"
        if instance.state == "starting" and minutes >= self.start_minutes:
            said = f": {instance.note}" if instance.note else ""
            return f"the instance has not started in {self.start_minutes:.0f} minutes{said}"
        return None

    def _again(self, why: str, track: _Track) -> bool:
        launcher = self.launcher
        launch = launcher.launch
        spent = launch.spent(time.time())
        # Watched from its start, it has done nothing that could be lost.
        nothing_lost = track.never_ran and launch.instances[-1].id in launcher.here
        refusal = None
        if not launch.instances[-1].sure:
            refusal, nothing_lost = "it is not certain that the instance belongs to this launch", False
        elif not launch.resumable and not nothing_lost:
            refusal = "the command has no --checkpoint off the machine, so another machine would start from scratch"
        elif len(launch.instances) > self.relaunches:
            refusal = f"the launch has rented {len(launch.instances)} machines (--relaunches {self.relaunches})"
        elif self.most_dollars is not None and spent >= self.most_dollars:
            refusal = f"the launch has cost ${spent:.2f} of ${self.most_dollars:.2f} (--max-total)"
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
