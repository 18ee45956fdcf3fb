"""Bounds on a measured model: what misses them makes the command fail and is not uploaded."""

from __future__ import annotations

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


def require_gate(settings: Settings, found: Comparison) -> None:
    """Raise GateError if a model's figures miss the bounds of settings."""
    missed = missed_gate(settings, found.edited)
    if missed is not None:
        raise GateError(f"{found.model}: {missed}", remedy="quantise less, choose another edit, or allow more")
