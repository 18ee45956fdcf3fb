"""Limits of a search: batches within the budget, and a grace period after a stop."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from job.config.schema import Settings
from job.lifecycle.lock import JobLock
from job.preflight.estimate import PHASES, Hours
from job.preflight.survey import Survey
from job.search.budget import Budget, Meter
from job.storage.atomic import read_record
from job.storage.run_folder import RunFolder
from job.system.signals import StopSignals


class SearchLimits:
    """Times and checkpoints batches, grants a stopped one its grace period, and ends the search at the budget."""

    def __init__(
        self, budget: Budget, hold: JobLock, signals: StopSignals, grace: float, *, begun: bool, finalists: float = 0.0
    ) -> None:
        """Set the limits; `begun`: a batch has run before; `finalists`: batches that take as long as measuring them."""
        self._budget = budget
        self._hold = hold
        self._signals = signals
        self._grace = grace
        self._begun = begun
        self._finalists = finalists
        self._longest = self._total = 0.0
        self._batches = 0

    @contextmanager
    def batch(self) -> Iterator[None]:
        """Time a batch, which may finish within the grace period after a stop."""
        begin = time.monotonic()
        with self._signals.graceful(self._grace):
            yield
        self._begun = True
        seconds = time.monotonic() - begin
        self._longest, self._total, self._batches = (
            max(self._longest, seconds),
            self._total + seconds,
            self._batches + 1,
        )
        self._hold.keep()

    def may_go_on(self) -> bool:
        """Return whether another batch fits, and then measuring the finalists; a job's first batch always runs.

        Raises HeldError after a takeover.
        """
        self._hold.check()
        finalists = self._finalists * self._total / self._batches if self._batches else 0.0
        return not self._begun or self._budget.has_room_for(self._longest + finalists)


def budget_of(folder: RunFolder, settings: Settings, meter: Meter) -> Budget:
    """Return the budget, reserving preflight's estimate for export and delivery."""
    hours = Hours(**dict.fromkeys(PHASES, 0.0))
    if folder.preflight_file.exists():
        hours = read_record(folder.preflight_file, Survey).hours or hours
    return Budget(
        meter,
        max_hours=settings.max_hours,
        max_cost=settings.max_cost,
        price=settings.price,
        reserve=hours.export + hours.upload,
    )
