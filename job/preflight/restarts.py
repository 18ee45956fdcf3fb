"""Detect restart loops: a platform that restarts a failing job forever."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from job.preflight.checks import Check
from job.records import Record

# This number of starts in a row that failed by themselves without progress is a loop.
MOST_FAILURES = 3
# Starts that vanished without a word (kill -9, out of memory, power) may be preemptions, but not for ever.
MOST_VANISHED = 10


class PastStart(Record):
    """A past start of this job.

    Attributes:
        ended: finished; error: failed by itself; preempted: by a signal or the platform; vanished: without a record;
            running: not ended.
        progress: It completed a phase or trial that earlier starts had not.
        settings: Key of its settings; a change restarts counting.
    """

    started: float
    ended: Literal["finished", "error", "preempted", "vanished", "running"]
    progress: bool = False
    settings: str = ""
    reason: str | None = None


# Events that tell of progress, and how a start's last event says that it ended.
_PROGRESS = frozenset({"prompts", "loaded", "directions", "trial", "export_proven", "delivery"})
_ENDS: dict[str, Literal["finished", "error", "preempted"]] = {
    "job_finished": "finished",
    "job_failed": "error",
    "job_preempted": "preempted",
}


def past_starts(events: Iterable[Mapping[str, Any]]) -> tuple[PastStart, ...]:
    """Return the starts in a run's events; reaching only an earlier start's stage is no progress."""
    starts: list[PastStart] = []
    furthest: set[str] = set()
    for event in events:
        name = str(event.get("event"))
        if name == "job_started":
            key = str(event.get("settings", ""))
            starts.append(PastStart(started=float(event["time"]), ended="vanished", settings=key))
        elif starts and name in _ENDS:
            # What preflight refuses costs a minute, and is put right without a change of settings.
            ended = "preempted" if event.get("phase") == "preflight" else _ENDS[name]
            starts[-1] = starts[-1].model_copy(update={"ended": ended, "reason": event.get("reason")})
        elif starts and name in _PROGRESS:
            point = f"{name} {event.get('number', '')}"
            if point not in furthest:
                starts[-1] = starts[-1].model_copy(update={"progress": True})
            furthest.add(point)
    return tuple(starts)


def restart_check(starts: Sequence[PastStart], settings: str = "") -> Check:
    """Report whether the job is finished or in a restart loop, from past starts and the present settings' key."""
    if starts and starts[-1].ended == "finished":
        return Check(name="restarts.loop", status="ok", measured="the job is finished", needed="nothing to do")
    failures, vanished, reason = _count_failed_starts(starts, settings)
    looping, dying = failures >= MOST_FAILURES, vanished >= MOST_VANISHED
    measured = f"{failures} failed and {vanished} vanished starts in a row without progress"
    remedy = ""
    if looping:
        remedy = "correct the failure, then start once with --allow restarts.loop, or change the settings"
    elif dying:
        remedy = (
            "choose a larger machine (each start died without an error: out of memory?), or give --allow restarts.loop"
        )
    return Check(
        name="restarts.loop",
        status="fail" if looping or dying else "ok",
        measured=measured + (f"; the last: {reason}" if reason else ""),
        needed=f"fewer than {MOST_FAILURES} failed and {MOST_VANISHED} vanished starts",
        remedy=remedy,
    )


def _count_failed_starts(starts: Sequence[PastStart], settings: str) -> tuple[int, int, str | None]:
    """Return the latest failed and vanished starts without progress, and the latest failure's reason."""
    failures = vanished = 0
    reason = None
    for start in reversed(starts):
        if start.progress or start.ended == "finished" or start.settings != settings:
            break
        # A preempted start neither counts nor forgives: it says nothing of what would have come.
        if start.ended == "error":
            failures += 1
            reason = reason or start.reason
        elif start.ended in ("vanished", "running"):
            vanished += 1
    return failures, vanished, reason
