"""Bounds on a measured model: what misses them makes the command fail and is not uploaded."""

from __future__ import annotations

from collections.abc import Sequence

from job.config.schema import Settings
from job.errors import GateError, UsageError
from job.evaluate.result import Comparison
from job.lifecycle.outcome import missed_gate


def with_bounds(settings: Settings, max_kl: float | None, max_refusals: int | None) -> Settings:
    """Return settings with the given bounds in place of their own. Raises UsageError if they have none then."""
    given = {"max_kl": max_kl, "max_refusals": max_refusals}
    found = settings.model_copy(update={name: bound for name, bound in given.items() if bound is not None})
    if found.max_kl is None and found.max_refusals is None:
        raise UsageError("--gate needs a bound", remedy="give --max-kl X, --max-refusals N or both")
    return found


def require_gate(settings: Settings, found: Sequence[Comparison]) -> None:
    """Raise GateError if figures of models miss the bounds of settings."""
    missed = [f"{one.model}: {reason}" for one in found if (reason := missed_gate(settings, one.edited)) is not None]
    if missed:
        raise GateError("; ".join(missed), remedy="quantise less, choose another edit, or allow more")
