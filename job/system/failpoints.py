"""Fail-points for tests, at every durable write and between the stages.

They act only if JOB_FAILPOINTS names a folder. Each file in it plants one fault, consumed by the process that meets it.
`kill@POINT` kills the process as a lost machine would; `job.model.device_faults` has other kinds. A file `passed` in
the folder receives the name of every passed point, one per line.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

FAILPOINTS = "JOB_FAILPOINTS"
_KILL = "kill@"
_PASSED = "passed"


def reached(point: str) -> None:
    """Kill this process if that is planted for the point."""
    folder = os.environ.get(FAILPOINTS)
    if not folder:
        return
    if (log := Path(folder) / _PASSED).exists():
        with log.open("a") as file:
            file.write(point + "\n")
    if take(_KILL + point):
        os.kill(os.getpid(), signal.SIGKILL)


def planted(kind: str) -> bool:
    """Consume a planted fault of a kind, `KIND` or `KIND-ANYTHING`; return whether there was one."""
    folder = os.environ.get(FAILPOINTS)
    names = sorted(os.listdir(folder)) if folder else []
    return any(name.partition("-")[0] == kind and take(name) for name in names)


def take(name: str) -> bool:
    """Consume a file in the folder; return whether there was one. Atomic across processes."""
    folder = os.environ.get(FAILPOINTS)
    if not folder:
        return False
    try:
        (Path(folder) / name).unlink()
    except FileNotFoundError:
        return False
    return True
