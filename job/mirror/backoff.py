"""Backoff and sparse warnings for failures in the background."""

from __future__ import annotations

from collections.abc import Callable

from job.errors import JobError
from job.system.clock import now
from job.system.retry import backoff_s
from job.text.redaction import redact

FIRST_RETRY_S = 0.5
_LONGEST_RETRY_S = 60.0


class Trouble:
    """Duration of an ongoing failure; warns at the first failure, then ever more rarely."""

    def __init__(self, what: str, say: Callable[[str], None]) -> None:
        self._what, self._say = what, say
        self._since: float | None = None
        self._next_word, self._failures = 0.0, 0
        self.latest = ""

    @property
    def seconds(self) -> float:
        """Seconds since the first failure, 0 without any."""
        since = self._since
        return now() - since if since is not None else 0.0

    def failed(self, error: Exception) -> float:
        """Record a failure; return seconds until the next try."""
        self.latest = redact(error.line if isinstance(error, JobError) else f"{type(error).__name__}: {error}")
        if self._since is None:
            self._since, self._next_word, self._failures = now(), 0.0, 0
        if self.seconds >= self._next_word:
            since = f"has failed for {self.seconds:.0f} s" if self._failures else "fails"
            self._say(f"warning: {self._what} {since}, the job goes on without: {self.latest}")
            self._next_word = max(self.seconds * 2, 10.0)
        self._failures += 1
        return backoff_s(self._failures, 2 * FIRST_RETRY_S, _LONGEST_RETRY_S)

    def passed(self) -> None:
        """Record a success."""
        if self._since is not None:
            self._say(f"{self._what} works again after {self.seconds:.0f} s")
        self._since = None
