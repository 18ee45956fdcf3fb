"""Time and cost of a job over all its starts and machines, and when to stop for its limits."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from job.errors import JobError
from job.records import Record
from job.storage.atomic import read_record, write_record
from job.system.periodic import every

# What a start that is killed may leave uncounted.
_TICK_SECONDS = 20.0


class Spent(Record):
    """meter.json: seconds and dollars of all starts; dollars only where the price was known."""

    seconds: float = 0.0
    dollars: float = 0.0


def read_spent(file: Path) -> Spent:
    """Return the recorded time and cost; zero if unreadable."""
    try:
        return read_record(file, Spent)
    except JobError:
        return Spent()


class Meter:
    """Measures a job's time and cost, continuing from earlier starts."""

    def __init__(self, file: Path, price: float | None, clock: Callable[[], float] = time.monotonic) -> None:
        """Start at the values in meter.json; `price` is dollars per hour, and the clock monotonic seconds."""
        self._file = file
        self._price = price or 0.0
        self._clock = clock
        self._before = read_spent(file)
        self._started = clock()
        self._lock = threading.Lock()

    @property
    def spent(self) -> Spent:
        """Time and cost so far."""
        seconds = self._clock() - self._started
        return Spent(
            seconds=self._before.seconds + seconds, dollars=self._before.dollars + seconds / 3600 * self._price
        )

    def tick(self) -> None:
        """Write time and cost so far to disk."""
        with self._lock:
            write_record(self._file, self.spent)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Write periodically within the block, and at its end."""

        def keep() -> None:
            try:
                self.tick()
            except JobError:
                return  # the disk is full; what writes something that matters will say so

        try:
            with every(_TICK_SECONDS, keep, "meter"):
                yield
        finally:
            self.tick()


class Budget:
    """Decides when a search must stop so that export and delivery fit within the limits."""

    def __init__(
        self, meter: Meter, *, max_hours: float | None, max_cost: float | None, price: float | None, reserve: float
    ) -> None:
        """Set the limits of the whole job: hours, dollars (None for no limit), and the hours reserved for export."""
        self._meter = meter
        self._max_hours = max_hours
        self._max_cost = max_cost
        self._price = price
        self._reserve = reserve

    @property
    def left(self) -> float | None:
        """Hours left for the search, None without a limit."""
        spent = self._meter.spent
        left = []
        if self._max_hours is not None:
            left.append(self._max_hours - spent.seconds / 3600)
        if self._max_cost is not None and self._price:
            left.append((self._max_cost - spent.dollars) / self._price)
        return min(left) - self._reserve if left else None

    def has_room_for(self, seconds: float) -> bool:
        """Return whether `seconds` more fit."""
        return self.left is None or self.left * 3600 >= seconds
