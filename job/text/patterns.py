"""Regular expressions of settings, compiled and searched within limits: a file of others may hold any."""

from __future__ import annotations

import re
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from job.errors import UsageError

LONGEST = 10_000
# Of processor time: usual patterns take less than a millisecond for a response.
SECONDS = 5.0
# On these, patterns that take exponential time do so, and others are quick.
_PROBES = tuple(unit * 200 + "\0" for unit in ("a", "A", "0", " ", "a ", "a.", "_", "-", "\n"))


class _TooSlowError(Exception):
    pass


def compiled(setting: str, text: str) -> re.Pattern[str]:
    """Compile a setting's regular expression, which ignores case. Raises UsageError, also for one that takes too long.

    In the main thread it is tried on repeated characters.
    """
    if len(text) > LONGEST:
        raise UsageError(f"{setting} is longer than {LONGEST} characters", remedy="shorten it")
    try:
        with _limited(SECONDS):
            pattern = re.compile(text, re.IGNORECASE)
            for probe in _PROBES if _can_limit() else ():  # elsewhere nothing would end them
                _count(pattern, probe)
    except _TooSlowError:
        raise _too_slow(setting) from None
    except (re.error, OverflowError, RecursionError) as error:
        raise UsageError(f"{setting} is no regular expression: {error}", remedy="correct it") from None
    return pattern


def count_matches(setting: str, pattern: re.Pattern[str], text: str) -> int:
    """Return how often a setting's pattern is found in a text. Raises UsageError if that takes too long."""
    try:
        with _limited(SECONDS):
            return _count(pattern, text)
    except _TooSlowError:
        raise _too_slow(setting) from None


def _count(pattern: re.Pattern[str], text: str) -> int:
    return sum(1 for _ in pattern.finditer(text))


def _too_slow(setting: str) -> UsageError:
    return UsageError(
        f"{setting} takes more than {SECONDS:g} s to search a text",
        remedy="write it without repetitions inside repetitions, such as (a+)+",
    )


def _can_limit() -> bool:
    return threading.current_thread() is threading.main_thread()


@contextmanager
def _limited(seconds: float) -> Iterator[None]:
    """Raise _TooSlowError after this processor time; in another thread than the main one, never.

    Matching looks for signals, which only the main thread receives.
    """
    if not _can_limit():
        yield
        return

    def stop(_number: int, _frame: object) -> None:
        raise _TooSlowError

    former = signal.signal(signal.SIGVTALRM, stop)
    try:
        signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, former)
