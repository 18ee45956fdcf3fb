"""Points at which tests have a run fail: at every durable write and between the stages.

Nothing happens unless JOB_FAILPOINTS names a folder. Each file in it plants one fault, and whoever meets the fault
takes the file away. `kill@POINT` kills the process at a point as a lost machine does; `job.model.device_faults`
has other kinds. A file `passed` in the folder is given the name of every point that the run passes, a line each.
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
    """Return whether a fault of a kind is planted, and take one away: `KIND` or `KIND-ANYTHING`."""
    folder = os.environ.get(FAILPOINTS)
    names = sorted(os.listdir(folder)) if folder else []
    return any(name.partition("-")[0] == kind and take(name) for name in names)


def take(name: str) -> bool:
    """Return whether a file is in the folder, and take it away; of several processes one gets it."""
    folder = os.environ.get(FAILPOINTS)
    if not folder:
        return False
    try:
        (Path(folder) / name).unlink()
    except FileNotFoundError:
        return False
    return True
