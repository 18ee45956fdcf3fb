"""Trying again after failures, with waits that grow and vary."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def backoff_s(failures: int, first_s: float, longest_s: float) -> float:
    """Return the seconds to wait after a number of failures: doubled each time, jittered by up to half."""
    wait: float = min(first_s * 2 ** min(failures - 1, 30), longest_s)
    return wait * random.uniform(0.5, 1.0)


def retried(call: Callable[[], T], wait_after: Callable[[Exception, int], float | None]) -> T:
    """Return what `call` returns, calling it again after failures.

    `wait_after` gets the error and the number of failures so far; it returns the seconds to wait, or None to give up.
    It may raise another error instead.
    """
    failures = 0
    while True:
        try:
            return call()
        except Exception as error:
            failures += 1
            pause = wait_after(error, failures)
            if pause is None:
                raise
        time.sleep(pause)  # a signal's `Stopped` ends it
