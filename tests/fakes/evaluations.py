"""Evaluations without a model, by which workers' processes are tested: tasks say what they are to do."""

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
        number: For what needs one.
    """

    what: str
    number: int = 0


class Doer:
    hardware = "abacus"

    def __init__(self) -> None:
        self._shared: Any = None

    def share(self, value: Any) -> None:
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
    """What workers evaluate with.

    Attributes:
        fails: Whether it cannot be opened.
    """

    fails: bool = False
    ballast: bytes = b""

    @contextmanager
    def opened(self) -> Iterator[Doer]:
        if self.fails:
            raise ImpossibleJobError("the model cannot be loaded there")
        yield Doer()


def nothing() -> None:
    """Warm up for nothing."""


def touch(file: Path) -> None:
    """Leave a sign of having been warmed up."""
    file.touch()
