"""A clock that never jumps, for durations that outlast a correction of the wall clock."""

from __future__ import annotations

import time


def now() -> float:
    """Return seconds of a monotonic clock that includes sleep where available."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()
