"""What a check returns, and how all of them together end a run."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Literal

from job.errors import ImpossibleJobError, MachineError
from job.records import Record

Status = Literal["ok", "warn", "fail"]
Scope = Literal["job", "machine"]

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30


class Check(Record):
    """One thing that was looked at.

    Attributes:
        name: Dotted short name, e.g. "disk.space"; `--allow NAME` overrides a fail. Several checks
            may share one, e.g. one for each file system.
        status: ok; warn: the job may run, but somebody should know; fail: it must not start.
        measured: What was found, with units, one line.
        needed: What there has to be, with units, one line.
        remedy: What the user can do; "" where nothing is to be done.
        scope: Whether another machine could do the job ("machine") or none ("job").
    """

    name: str
    status: Status
    measured: str
    needed: str
    remedy: str = ""
    scope: Scope = "machine"

    @property
    def line(self) -> str:
        """The check in one line, with the remedy where there is one."""
        return f"{self.name}: {self.measured}" + (f"; {self.remedy}" if self.remedy else "")


def size(count: float) -> str:
    """Return a number of bytes for people: "512 B", "3.4 MiB", "61.0 GiB"."""
    for unit, name in ((GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        # From 0.995 on the unit below would be rounded up to its end.
        if abs(count) >= 0.995 * unit:
            return f"{count / unit:.1f} {name}"
    return f"{count:.0f} B"


def speed(bytes_per_second: float) -> str:
    """Return a transfer rate for people, in MB/s (10⁶ bytes), as disks and lines are sold."""
    return f"{bytes_per_second / 1e6:.0f} MB/s" if bytes_per_second >= 1e7 else f"{bytes_per_second / 1e6:.1f} MB/s"


def is_allowed(check: Check, allowed: Collection[str]) -> bool:
    """Return whether the user has overridden this check by its name."""
    return check.name in allowed


def exit_code(checks: Iterable[Check], allowed: Collection[str] = ()) -> int:
    """Return what the failed checks make the process end with: 0 where none failed.

    A job that cannot succeed anywhere outweighs a machine that cannot do it (DESIGN section 6).
    """
    scopes = {check.scope for check in checks if check.status == "fail" and not is_allowed(check, allowed)}
    if "job" in scopes:
        return ImpossibleJobError.exit_code
    return MachineError.exit_code if scopes else 0
