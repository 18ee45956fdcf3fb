"""End of the rental: a delivered job stops or destroys its rented machine.

Call it only if nothing can be lost (`job.lifecycle.end_of_rental`). The request is recorded first in the workspace,
outside any job's folder and hence any mirror: it concerns this instance. A stop leaves a mark, so that the next start
without work does not stop it again.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from job.cloud import runpod, vast
from job.cloud.api import Api, KeyRefusedError, Patience
from job.cloud.provider import Action, Market
from job.errors import JobError, MachineError
from job.records import Record
from job.storage.atomic import write_atomically

FOLDER = ".rentals"
# About five minutes: what bills by the hour is worth insisting on.
PATIENCE = Patience(tries=10, first_wait=1.0, longest_wait=60.0)
_TOOL_SECONDS = 60.0
# A stop with unknown result is requested once more, then never again.
_MOST_UNKNOWN = 2


class Sentinel(Record):
    """The requested end of an instance.

    Attributes:
        state: asked: result unknown; taken: accepted by the platform; failed: refused.
        asked: Requests with unknown result.
    """

    action: Action
    state: Literal["asked", "taken", "failed"]
    asked: int = 1
    at: float
    problem: str = ""


class EndRecord(Record):
    """The result of ending a rental.

    Attributes:
        state: none: nothing to do; taken: the platform ends the instance; held back: stopped before, then started by
            someone; failed: it bills on.
    """

    state: Literal["none", "taken", "held back", "failed"]
    problem: str = ""


@dataclass(frozen=True)
class Rental:
    """The instance that this process runs on.

    Attributes:
        by_hand: Where people end it.
        tools: The platform's client commands that end it, by action, preferred first.
    """

    platform: str
    instance: str
    by_hand: str
    tools: Mapping[Action, tuple[tuple[str, ...], ...]]
    patience: Patience = PATIENCE
    _market: Callable[[Callable[[str], None], Patience], Market] = field(repr=False, kw_only=True)

    @property
    def _briefly(self) -> Patience:
        return replace(self.patience, tries=min(self.patience.tries, 3))

    @property
    def _name(self) -> str:
        return f"{self.platform.lower().partition('.')[0]}-{re.sub(r'[^A-Za-z0-9_-]', '_', self.instance)}"

    def _sentinel(self, workspace: Path) -> Path:
        return workspace / FOLDER / f"{self._name}.json"

    def progressed(self, workspace: Path) -> None:
        """Forget an earlier stop: new work was done, so the next stop cannot loop."""
        _remove(self._sentinel(workspace))

    def check(self) -> str:
        """Return this instance's state, which proves access to the platform. Raises MachineError."""
        try:
            found = self._market(_silent, self._briefly).instance(self.instance)
        except KeyRefusedError as error:
            remedy = f"{error.remedy}, or leave the rental alone with --when-done nothing"
            raise MachineError(str(error), remedy=remedy) from error
        if found.state == "gone":
            raise MachineError(
                f"{self.platform} has no instance {self.instance}",
                remedy="leave the rental alone with --when-done nothing",
            )
        return f"{self.platform} instance {found.line}"

    def price(self) -> float | None:
        """Return the billed dollars per hour of this instance, or None."""
        try:
            return self._market(_silent, self._briefly).instance(self.instance).dollars
        except JobError:
            return None

    def end(self, action: Action, workspace: Path, say: Callable[[str], None]) -> EndRecord:
        """Record the request, then stop or destroy this instance; after `taken` this process will soon end too."""
        if action == "nothing":
            return EndRecord(state="none")
        say = unfailing(say)
        file, alarm = self._sentinel(workspace), workspace / f"RENTAL-NOT-ENDED-{self._name}.txt"
        before = _read(file)
        if before is not None and before.action == action == "stop" and _is_in_force(before):
            say(
                f"this instance was stopped before and started again: it is not stopped a second time and "
                f"BILLS ON; end it at {self.by_hand}, or remove {file}"
            )
            return EndRecord(state="held back")
        unknown = before.asked if before is not None and before.state == "asked" else 0
        _write(file, Sentinel(action=action, state="asked", asked=unknown + 1, at=time.time()), say)
        say(f"ending the rental: {action} {self.platform} instance {self.instance}")
        problem = self._ask(action, say)
        if problem is None:
            _write(file, Sentinel(action=action, state="taken", at=time.time()), say)
            _remove(alarm)
            say(f"{self.platform} accepted the request: {action} instance {self.instance}")
            return EndRecord(state="taken")
        _write(file, Sentinel(action=action, state="failed", at=time.time(), problem=problem), say)
        return self._failed(action, problem, alarm, say)

    def _ask(self, action: Action, say: Callable[[str], None]) -> str | None:
        """Return why the platform does not end the instance, None if it does."""
        try:
            self._market(say, self.patience).end(self.instance, action)
        except JobError as error:
            problem = error.line
        else:
            return None
        for command in self.tools.get(action, ()):
            if shutil.which(command[0]) is None:
                continue
            say(f"{problem}; trying {command[0]}")
            if _succeeds(command):
                return None
        return problem

    def _failed(self, action: Action, problem: str, alarm: Path, say: Callable[[str], None]) -> EndRecord:
        """Alert people by every available means."""
        lines = (
            f"THIS RENTAL BILLS ON: {self.platform} instance {self.instance} could not be ended ({action}).",
            problem,
            f"End it by hand at {self.by_hand}; the job no longer needs it.",
        )
        try:
            write_atomically(alarm, ("\n".join(lines) + "\n").encode())
        except MachineError as error:
            say(error.line)
        for line in lines:
            say(line)
        return EndRecord(state="failed", problem=f"{lines[0]} {problem}; end it by hand at {self.by_hand}")


def find_rental(env: Mapping[str, str] | None = None, *, patience: Patience = PATIENCE) -> Rental | None:
    """Return the rental of this process by the platforms' environment variables, or None."""
    env = os.environ if env is None else env
    pod = env.get("RUNPOD_POD_ID", "")
    if pod:
        return _on_runpod(pod, env, patience)
    label = re.fullmatch(r"C\.(\d+)", env.get("VAST_CONTAINERLABEL", ""))
    number = label[1] if label else env.get("CONTAINER_ID", "")
    # CONTAINER_ID may be someone else's: require a number, and another sign of the platform.
    if re.fullmatch(r"\d+", number) and (label or env.get("CONTAINER_API_KEY")):
        return _on_vast(number, env, patience)
    return None


def progressed(workspace: Path) -> None:
    """Forget an earlier stop of this machine, if rented; see `Rental.progressed`."""
    rental = find_rental()
    if rental is not None:
        rental.progressed(workspace)


def unfailing(say: Callable[[str], None]) -> Callable[[str], None]:
    """Wrap `say` to never raise: a full or closed log must not keep a rental."""

    def said(message: str) -> None:
        try:
            say(message)
        except Exception:  # any failure: a closed console, a full disk, a missing device
            return

    return said


def _on_vast(number: str, env: Mapping[str, str], patience: Patience) -> Rental:
    base, key = env.get(vast.BASE_NAME) or vast.BASE, env.get("CONTAINER_API_KEY", "")

    def market(say: Callable[[str], None], patience: Patience) -> Market:
        return vast.Vast(Api("Vast.ai", base, key, "CONTAINER_API_KEY", say, patience))

    by_hand = "https://console.vast.ai/instances/"
    return Rental("Vast.ai", number, by_hand, {}, patience, _market=market)


def _on_runpod(pod: str, env: Mapping[str, str], patience: Patience) -> Rental:
    base, key = env.get(runpod.BASE_NAME) or runpod.BASE, env.get("RUNPOD_API_KEY", "")

    def market(say: Callable[[str], None], patience: Patience) -> Market:
        return runpod.RunPod(Api("RunPod", base, key, "RUNPOD_API_KEY", say, patience))

    # The second form of each is that of versions before 2.
    tools: dict[Action, tuple[tuple[str, ...], ...]] = {
        "destroy": (("runpodctl", "pod", "delete", pod), ("runpodctl", "remove", "pod", pod)),
        "stop": (("runpodctl", "pod", "stop", pod), ("runpodctl", "stop", "pod", pod)),
    }
    return Rental("RunPod", pod, "https://console.runpod.io/pods", tools, patience, _market=market)


def _is_in_force(before: Sentinel) -> bool:
    return before.state == "taken" or (before.state == "asked" and before.asked >= _MOST_UNKNOWN)


def _read(file: Path) -> Sentinel | None:
    try:
        return Sentinel.model_validate_json(file.read_bytes())
    except (OSError, ValidationError):
        return None


def _write(file: Path, sentinel: Sentinel, say: Callable[[str], None]) -> None:
    """Write a sentinel; a full disk must not keep the rental."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, (sentinel.model_dump_json(indent=2) + "\n").encode())
    except (OSError, MachineError) as error:
        say(f"cannot record the end of the rental: {error}")


def _remove(alarm: Path) -> None:
    try:
        alarm.unlink(missing_ok=True)
    except OSError:
        return  # it is missing, or the folder is read-only by now


def _succeeds(command: tuple[str, ...]) -> bool:
    try:
        done = subprocess.run(command, capture_output=True, timeout=_TOOL_SECONDS, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0


def _silent(_: str) -> None:
    pass
