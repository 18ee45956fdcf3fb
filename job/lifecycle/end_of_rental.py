"""End of a start on a rented machine: stop or destroy it by policy, once everything is safe."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from job.cloud.end_policy import SAFE, Action, AskedEnds, Decision, Ended, ending
from job.cloud.self_stop import find_rental, progressed, unfailing
from job.config.load import default_workspace
from job.config.schema import Settings
from job.errors import HeldError, JobError
from job.lifecycle.safekeeping import all_unsaved, other_holder, undelivered
from job.storage.events import Events
from job.storage.jobs import settings_if_readable
from job.storage.run_folder import RunFolder
from job.system.lifeline import tell

Say = Callable[[str], None]


@dataclass(frozen=True)
class Machine:
    """A machine after a start: workspace, run folder (None if not yet known) and settings (None if unknown)."""

    workspace: Path
    folder: RunFolder | None = None
    settings: Settings | None = None


def outcome_of_error(error: Exception) -> Ended:
    """Return how a start ended that raised an error."""
    code = error.exit_code if isinstance(error, JobError) else 1
    return Ended(code, elsewhere=isinstance(error, HeldError) and error.elsewhere)


def end_rental(outcome: Ended, asked: AskedEnds, machine: Machine, say: Say) -> None:
    """Stop or destroy the machine by policy; raises nothing."""
    say = unfailing(say)
    try:
        _end(outcome, asked, machine, say)
    except Exception as error:  # callers must see the job's own failure
        what = error.line if isinstance(error, JobError) else f"{type(error).__name__}: {error}"
        say(f"warning: this rental may BILL ON: its end could not be decided: {what}")
    tell(settled=True)


def end_after(
    code: int, *, when_failed: str, workspace: str | None, job: str | None, hung: bool, signalled: bool
) -> None:
    """End the rental for a process that could not; see `end_rental`.

    `code` is its exit code, negative for a signal; unknown paths are None. `hung` means that the watchdog ended it,
    `signalled` that it was asked to stop.
    """
    events = Events()
    folder = RunFolder(Path(job)) if job is not None else None
    action: Action = "destroy" if when_failed == "destroy" else "stop" if when_failed == "stop" else "nothing"
    settings = settings_if_readable(folder) if folder is not None else None
    machine = Machine(Path(workspace) if workspace else _usual_workspace(), folder, settings)
    end_rental(Ended(code, hung=hung, signalled=signalled), AskedEnds(when_failed=action), machine, events.say)


def _usual_workspace() -> Path:
    try:
        return Path(default_workspace())
    except JobError:  # a faulty environment may be why the start ended
        return Path("runs")


def _end(outcome: Ended, asked: AskedEnds, machine: Machine, say: Say) -> None:
    decision = ending(outcome, asked, SAFE)
    if decision.action == "nothing":
        return
    rental = find_rental()
    if rental is None:
        say(f"warning: this machine is not a known rental: it is not ended ({decision.action})")
        return
    decision = _decision(outcome, asked, machine, say)
    if decision.action == "nothing":
        say(f"warning: THIS RENTAL BILLS ON: {_explain_other_ending(decision)}; end it by hand at {rental.by_hand}")
        return
    if decision.reduced:
        say(f"warning: {_explain_other_ending(decision)}")
    rental.end(decision.action, machine.workspace, say)


def _decision(outcome: Ended, asked: AskedEnds, machine: Machine, say: Say) -> Decision:
    """Decide by the current state; mirrors and targets are queried only before a destroy."""
    safety = replace(
        SAFE,
        others=undelivered(machine.workspace, machine.folder),
        held="" if outcome.elsewhere else other_holder(machine.folder, machine.settings, say),
    )
    decision = ending(outcome, asked, safety)
    if decision.action != "destroy":
        return decision
    say("checking checkpoint and targets for all that must survive before this machine is destroyed")
    missing = all_unsaved(machine.workspace, machine.folder, machine.settings, say, elsewhere=outcome.elsewhere)
    return ending(outcome, asked, replace(safety, unsaved=missing))


def _explain_other_ending(decision: Decision) -> str:
    done = "the machine keeps running" if decision.action == "nothing" else "the machine is stopped"
    return f"{decision.asked} was requested, but {done}: {decision.reason}"


class Progress:
    """Event listener that clears the mark of an earlier stop once a start does new work.

    A start with nothing to do keeps the mark, which prevents stopping the machine again. Otherwise a platform that
    restarts stopped machines would loop forever.
    """

    def __init__(self, workspace: Path, folder: RunFolder) -> None:
        self._workspace, self._folder = workspace, folder
        self._before: set[tuple[str, str]] = set()
        self._made = False

    def __call__(self, event: str, fields: dict[str, Any]) -> None:
        """Handle an event."""
        if event == "job_started":
            self._before = self._delivered()
        elif not self._made and self._is_new_work(event, fields):
            self._made = True
            progressed(self._workspace)

    def _delivered(self) -> set[tuple[str, str]]:
        try:
            return {(one.target, one.export) for one in self._folder.read_uploads() if one.state == "done"}
        except (OSError, ValueError):
            return set()  # a damaged file is reported by the delivery

    def _is_new_work(self, event: str, fields: dict[str, Any]) -> bool:
        if event == "delivery":
            return fields["state"] == "done" and (fields["target"], fields["export"]) not in self._before
        return event in ("trial", "exported")
