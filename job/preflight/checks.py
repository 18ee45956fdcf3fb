"""Checks and their combined exit code."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Iterable
from typing import Literal, TypeVar

from job.errors import ImpossibleJobError, JobError, MachineError, UsageError
from job.records import Record

Status = Literal["ok", "warn", "fail"]
Scope = Literal["job", "machine"]

T = TypeVar("T")

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30


# All names that a check may have; those of prompt sets are "data." and the setting's name.
NAMES = frozenset(
    [
        "settings",
        "settings.old",
        "settings.directions",
        "job",
        "job.lock",
        "job.lease",
        "strays.own",
        "restarts.loop",
        "model",
        "model.files",
        "model.weights",
        "model.architecture",
        "model.tokenizer",
        "model.template",
        "model.licence",
        "data",
        "data.overlap",
        "machine",
        "disk",
        "disk.space",
        "disk.inodes",
        "disk.writable",
        "disk.storage",
        "disk.locks",
        "disk.speed",
        "memory.ram",
        "memory.shm",
        "limits.threads",
        "limits.cpus",
        "limits.open-files",
        "limits.address-space",
        "limits.file-size",
        "gpu.present",
        "gpu.driver",
        "gpu.architecture",
        "gpu.bf16",
        "gpu.ecc",
        "gpu.mig",
        "gpu.balance",
        "gpu.holders",
        "gpu.compute",
        "model.dtype",
        "gpu.memory",
        "gpu.gradient",
        "target",
        "target.local",
        "target.hf",
        "target.s3",
        "checkpoint",
        "scorer",
        "scorer.nli",
        "scorer.classifier",
        "scorer.judge",
        "cluster",
        "rental.end",
        "rental.survival",
        "rental.checkpoint",
        "rental.others",
        "estimate.time",
        "estimate.cost",
    ]
)


def require_known(names: Iterable[str]) -> None:
    """Raise UsageError for names of unknown checks: a misspelt one would allow nothing."""
    for name in names:
        if name not in NAMES and not name.startswith("data."):
            close = difflib.get_close_matches(name, NAMES, n=1)
            raise UsageError(
                f"--allow {name}: no check has that name",
                remedy=f"did you mean {close[0]}?" if close else "`abliterate preflight` prints their names",
            )


class Check(Record):
    """One check.

    Attributes:
        name: Dotted short name, e.g. "disk.space"; `--allow NAME` overrides a failure. Several checks may share one,
            e.g. per file system.
        status: ok; warn: the job may run; fail: it must not start.
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
        """The check and its remedy in one line."""
        return f"{self.name}: {self.measured}" + (f"; {self.remedy}" if self.remedy else "")


def size(count: float) -> str:
    """Format bytes: "512 B", "3.4 MiB", "61.0 GiB"."""
    for unit, name in ((GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        # From 0.995 on the unit below would be rounded up to its end.
        if abs(count) >= 0.995 * unit:
            return f"{count / unit:.1f} {name}"
    return f"{count:.0f} B"


def speed(bytes_per_second: float) -> str:
    """Format a transfer rate in MB/s (10⁶ bytes), as for disks and networks."""
    return f"{bytes_per_second / 1e6:.0f} MB/s" if bytes_per_second >= 1e7 else f"{bytes_per_second / 1e6:.1f} MB/s"


def is_allowed(check: Check, allowed: Collection[str]) -> bool:
    """Return whether the user allows this check to fail."""
    return check.name in allowed


def exit_code(checks: Iterable[Check], allowed: Collection[str] = ()) -> int:
    """Return the exit code for failed checks, 0 without any; "job" takes precedence over "machine"."""
    scopes = {check.scope for check in checks if check.status == "fail" and not is_allowed(check, allowed)}
    if "job" in scopes:
        return ImpossibleJobError.exit_code
    return MachineError.exit_code if scopes else 0


def attempt(name: str, step: Callable[[], T]) -> T | Check:
    """Return a step's value, or a failed check with this name. Raises UsageError for a malformed setting."""
    try:
        return step()
    except UsageError:
        raise
    except JobError as error:
        return Check(
            name=name,
            status="fail",
            measured=str(error),
            needed="access to it",
            remedy=error.remedy,
            scope="job" if isinstance(error, ImpossibleJobError) else "machine",
        )


def guarded(name: str, group: Callable[[], list[Check]]) -> list[Check]:
    """Run a group of checks; an error becomes a failed check `name`. Raises UsageError for a malformed setting."""
    found = attempt(name, group)
    return [found] if isinstance(found, Check) else found
