"""Time and cost of a job's phases, from its events."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

# Events that start a phase within a stage of the pipeline.
_WITHIN = {"residuals_started": "directions"}
_ENDS = frozenset({"job_finished", "job_failed", "job_preempted"})
_STAGE = ("preflight", "model", "directions", "search", "export", "upload")


@dataclass
class PhaseTime:
    """Time of one phase over all starts, and its dollars where the price was known, else None."""

    name: str
    seconds: float = 0.0
    dollars: float | None = None


def phase_times(events: Iterable[Mapping[str, Any]]) -> list[PhaseTime]:
    """Return the time of each phase; a killed start counts until its last event."""
    found: dict[str, PhaseTime] = {}
    phase: PhaseTime | None = None
    price: float | None = None
    since = 0.0
    for event in events:
        name, now = event.get("event"), float(event.get("time", since))
        if phase is not None and name != "job_started":
            _add(phase, max(now - since, 0.0), price)
        since = now
        if name == "job_started":
            phase, price = None, event.get("price")
        elif name in _ENDS:
            phase = None
        elif name == "phase" or (phase is not None and name in _WITHIN):
            called = str(event["name"]) if name == "phase" else _WITHIN[str(name)]
            phase = found.setdefault(called, PhaseTime(called))
    return sorted(found.values(), key=lambda one: _STAGE.index(one.name) if one.name in _STAGE else len(_STAGE))


def time_spent(metered: float, phases: Iterable[PhaseTime]) -> float:
    """Return the seconds of all starts: those of the meter, or of the phases where it lags behind the latest event."""
    return max(metered, sum(phase.seconds for phase in phases))


def _add(phase: PhaseTime, seconds: float, price: float | None) -> None:
    phase.seconds += seconds
    if price is not None:
        phase.dollars = (phase.dollars or 0.0) + seconds / 3600 * price
