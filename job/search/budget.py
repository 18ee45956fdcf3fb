"""Time and money that a job has taken, over all its starts and machines, and when to stop for them."""

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
    """meter.json: what a job has taken so far.

    Attributes:
        seconds: Time of all starts.
        dollars: Of the starts whose price was known.
    """

    seconds: float = 0.0
    dollars: float = 0.0


def read_spent(file: Path) -> Spent:
    """Return what a job has taken; nothing where it is not known."""
    try:
        return read_record(file, Spent)
    except JobError:
        return Spent()


class Meter:
    """Counts what a job takes, from where earlier starts have got to."""

    def __init__(self, file: Path, price: float | None, clock: Callable[[], float] = time.monotonic) -> None:
        """Begin to count.

        Args:
            file: meter.json.
            price: Dollars an hour of this machine, None if unknown.
            clock: Seconds that no change of the wall clock moves.
        """
        self._file = file
        self._price = price or 0.0
        self._clock = clock
        self._before = read_spent(file)
        self._started = clock()
        self._lock = threading.Lock()

    @property
    def spent(self) -> Spent:
        """What the job has taken until now."""
        seconds = self._clock() - self._started
        return Spent(
            seconds=self._before.seconds + seconds, dollars=self._before.dollars + seconds / 3600 * self._price
        )

    def tick(self) -> None:
        """Write down what the job has taken until now."""
        with self._lock:
            write_record(self._file, self.spent)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Write it down every now and then within the block, and at its end."""

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
    """Tells when a search has to stop so that its best can still be exported and delivered within the limits."""

    def __init__(
        self, meter: Meter, *, max_hours: float | None, max_cost: float | None, price: float | None, reserve: float
    ) -> None:
        """Set the limits.

        Args:
            meter: What has been taken.
            max_hours: Hours of the whole job, None for any.
            max_cost: Dollars of the whole job, None for any.
            price: Dollars an hour of this machine, None if unknown.
            reserve: Hours that export and delivery will take.
        """
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
        """Return whether something that takes so long still fits."""
        return self.left is None or self.left * 3600 >= seconds
