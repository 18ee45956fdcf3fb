"""A worker, seen from the run and from inside, and the interface of engines that start workers."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, Protocol

from job.errors import JobError


class WorkerLost(Exception):  # noqa: N818 - an event, handled by the executor
    """A worker died, is unreachable or was given up; the message says why."""


class WorkerOutOfMemory(MemoryError):  # noqa: N818 - a MemoryError, and handled as one
    """A worker ran out of memory."""


class Evaluator(Protocol):
    """Evaluates tasks in a worker with the model that it has loaded."""

    @property
    def hardware(self) -> str:
        """The hardware it computes on."""

    def share(self, value: Any) -> None:
        """Keep a value that later tasks use, such as the directions, and prepare for them."""

    def evaluate(self, task: Any) -> Any:
        """Return the result of a task."""


class Evaluation(Protocol):
    """Data to evaluate a job's tasks; pickled, without secrets."""

    def opened(self) -> AbstractContextManager[Evaluator]:
        """Return an evaluator, usable within the block."""


class Host:
    """The inside of a worker: an evaluator, and what it answers."""

    def __init__(self, resources: ExitStack) -> None:
        """Take the stack that will hold what the evaluator opens."""
        self._resources = resources
        self._evaluator: Evaluator | None = None

    def answer(self, method: str, value: Any) -> Any:
        """Return the result of `begin`, `share` or `evaluate`, or the exception that the run is to raise."""
        try:
            if method == "begin":
                self._evaluator = self._resources.enter_context(value.opened())
                return self._evaluator.hardware
            return getattr(self._evaluator, method)(value)
        except MemoryError as error:
            return WorkerOutOfMemory(str(error)) if method == "evaluate" else WorkerLost(f"has failed: {error}")
        except JobError as error:
            return WorkerLost(f"has failed: {error.line}")


class Worker(ABC):
    """A worker as the run sees it.

    Attributes:
        finished: How many tasks it has evaluated.
    """

    def __init__(self) -> None:
        self.hardware = ""
        self.finished = 0

    @abstractmethod
    def ask(self, method: str, value: Any, limit: float | None = None) -> Any:
        """Return its answer. Raises WorkerOutOfMemory; WorkerLost on death, after `limit` seconds, or once unneeded."""

    @abstractmethod
    def end(self) -> None:
        """Kill it; raises nothing."""


def hung(limit: float) -> WorkerLost:
    """Return the loss of a worker that has not answered within a number of seconds."""
    return WorkerLost(f"has hung: no result after {limit:.0f} s")


def result_of(answer: Any) -> Any:
    """Return the result in an answer of `Host`. Raises WorkerOutOfMemory or WorkerLost if it tells so."""
    if isinstance(answer, WorkerLost | WorkerOutOfMemory):
        raise answer
    return answer


class Engine(ABC):
    """Runs workers on this machine or a cluster."""

    def __init__(self) -> None:
        self._ended = threading.Event()
        self._resources = ExitStack()
        self._running: set[Worker] = set()

    @abstractmethod
    def open(self, evaluation: Evaluation) -> None:
        """Set the evaluation that workers open. Raises MachineError if the engine cannot be used."""

    @abstractmethod
    def capacity(self) -> int:
        """Return how many workers may run now, beside this process. Raises MachineError if the engine is gone."""

    @abstractmethod
    def worker(self, number: int) -> AbstractContextManager[Worker]:
        """Return a worker that is ready, and killed after the block. Raises WorkerLost if it ends first."""

    def put(self, value: Any) -> Any:
        """Return a handle of a value for many workers. Raises MachineError if there is no room."""
        return value

    def end(self) -> None:
        """Kill all workers; no other can begin."""
        self._ended.set()
        for worker in list(self._running):
            worker.end()

    def close(self) -> None:
        """Release the engine's resources, once no thread waits for a worker."""
        self._resources.close()

    def require_wanted(self) -> None:
        """Raise WorkerLost if it is pointless to wait for a worker."""
        if self._ended.is_set():
            raise WorkerLost("is no longer needed")

    @contextmanager
    def _kept(self, worker: Worker) -> Iterator[Worker]:
        self._running.add(worker)
        try:
            self.require_wanted()  # once it is among them: either this or `end` sees the other
            yield worker
        finally:
            self._running.remove(worker)
            worker.end()
