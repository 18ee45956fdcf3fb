"""preflight.json: all checks, and the plan that follows from them."""

from __future__ import annotations

from collections import Counter
from typing import Any

from job.errors import ImpossibleJobError, MachineError
from job.preflight.checks import Check, exit_code, is_allowed
from job.preflight.estimate import Hours
from job.preflight.memory_plan import MemoryPlan
from job.records import Record


class Survey(Record):
    """preflight.json.

    Attributes:
        allowed: Checks that the user allows to fail.
        plan: Memory plan, None if the model does not fit.
        hours: Expected duration of each phase, None if the device's speed is unknown.
        offers: Query that finds such a machine; None for this machine.
    """

    checks: tuple[Check, ...]
    allowed: tuple[str, ...] = ()
    plan: MemoryPlan | None = None
    hours: Hours | None = None
    offers: str | None = None
    commit: str | None = None
    public: bool = False

    @property
    def exit_code(self) -> int:
        """Exit code if the job must not start, else 0."""
        return exit_code(self.checks, self.allowed)

    @property
    def summary(self) -> str:
        """Number of checks by status."""
        counts = Counter(check.status for check in self.checks)
        return ", ".join(f"{counts[status]} {status}" for status in ("ok", "warn", "fail") if counts[status])

    @property
    def failures(self) -> list[Check]:
        """Failed checks that keep the job from starting."""
        return [check for check in self.checks if check.status == "fail" and not is_allowed(check, self.allowed)]

    def as_json(self) -> dict[str, Any]:
        """Return the survey as `abliterate preflight --json` prints it."""
        return {"ok": not self.failures, **self.model_dump(mode="json")}

    def require(self) -> None:
        """Raise ImpossibleJobError (no machine could) or MachineError (this one cannot) if the job must not start."""
        if not self.failures:
            return
        kind = ImpossibleJobError if self.exit_code == ImpossibleJobError.exit_code else MachineError
        # First what no machine could do: "job" sorts before "machine".
        first = min(self.failures, key=lambda check: check.scope)
        others = len(self.failures) - 1
        more = f" (and {others} more, see `abliterate preflight`)" if others else ""
        raise kind(f"preflight: {first.name}: {first.measured}{more}", remedy=first.remedy)
