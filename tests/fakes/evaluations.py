"""Evaluations without a model, to test worker processes: a task names what to do."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from job.errors import ImpossibleJobError


@dataclass(frozen=True)
class Do:
    """A task.

    Attributes:
        what: `square`, `pid`, `environment`, `shared`, `memory`, `die`, `hang` or `error`.
        number: Argument, where needed.
    """

    what: str
    number: int = 0


class Doer:
    hardware = "abacus"

    def __init__(self, shares: bool) -> None:
        self._shared: Any = None
        self._shares = shares

    def share(self, value: Any) -> None:
        if not self._shares:
            raise MemoryError("2 GiB are too few")
        self._shared = value

    def evaluate(self, task: Do) -> Any:
        if task.what == "memory":
            raise MemoryError("2 GiB are too few")
        if task.what == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if task.what == "hang":
            time.sleep(600)
        if task.what == "error":
            raise ImpossibleJobError("the model's files have changed")
        answers = {"square": task.number**2, "pid": os.getpid(), "environment": dict(os.environ)}
        return self._shared if task.what == "shared" else answers[task.what]


@dataclass(frozen=True)
class Doing:
    """The evaluation that workers open.

    Attributes:
        fails: Why opening it fails, if it does; for want of memory if that is what it says.
        shares: Whether there is memory to prepare for a shared value.
    """

    fails: str | None = None
    shares: bool = True
    ballast: bytes = b""

    @contextmanager
    def opened(self) -> Iterator[Doer]:
        if self.fails is not None:
            raise MemoryError(self.fails) if "GiB" in self.fails else ImpossibleJobError(self.fails)
        yield Doer(self.shares)


def nothing() -> None:
    """Skip the warm-up."""


def touch(file: Path) -> None:
    """Create a file as a sign of the warm-up."""
    file.touch()
