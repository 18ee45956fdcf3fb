"""Evaluate numbered tasks in this process and its workers, with any engine.

Tasks and results are values: which process evaluates one, when, and after how many attempts makes no difference. One
thread per worker hands it the next free task and waits; this process takes tasks from the same list. A worker that dies
or hangs is replaced, and its task becomes free again (docs/decisions/0015-workers.md).
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal, Protocol, Self

from job.errors import JobError
from job.storage.events import Events

# Stop restarting a worker after this many losses in a row without a result.
MOST_LOSSES = 3
# After this many lost workers a task is left to this process, which then meets the same fault.
LOSSES_OF_A_TASK = 2
# A task hangs after this many times the slowest task's time, and at least this many seconds.
HANG_FACTOR, HANG_SECONDS = 20.0, 120.0
_RESTART_SECONDS = 1.0


class WorkerLost(Exception):  # noqa: N818 - an event, handled by the executor
    """A worker died, is unreachable or was given up; the message says why."""


class WorkerOutOfMemory(MemoryError):  # noqa: N818 - a MemoryError, and handled as one
    """A worker ran out of memory."""


class Evaluator(Protocol):
    """The worker's side: evaluates tasks with the model that it has loaded."""

    @property
    def hardware(self) -> str:
        """The hardware it computes on."""

    def share(self, value: Any) -> None:
        """Keep a value that later tasks use, such as the directions."""

    def evaluate(self, task: Any) -> Any:
        """Return the result of a task."""


class Evaluation(Protocol):
    """Data to evaluate a job's tasks; pickled, without secrets."""

    def opened(self) -> AbstractContextManager[Evaluator]:
        """Return an evaluator, usable within the block."""


class Worker(Protocol):
    """A process that evaluates one task at a time. All methods raise WorkerLost."""

    hardware: str

    def share(self, value: Any) -> None:
        """Send a value from `Engine.put`, for use by later tasks."""

    def evaluate(self, task: Any, limit: float | None) -> Any:
        """Return a task's result within `limit` seconds. Raises WorkerOutOfMemory."""

    def end(self) -> None:
        """Kill it; raises nothing."""


# A worker's reply: its result, out of memory, or why it ends.
Outcome = tuple[Literal["result", "memory", "failed"], Any]


def outcome_of(act: Callable[[], Any]) -> Outcome:
    """Run an act and return its outcome in a picklable form."""
    try:
        return "result", act()
    except MemoryError as error:
        return "memory", str(error)
    except JobError as error:
        return "failed", error.line


def value_of(outcome: Outcome) -> Any:
    """Return the result of an outcome. Raises WorkerOutOfMemory or WorkerLost."""
    kind, value = outcome
    if kind == "memory":
        raise WorkerOutOfMemory(value)
    if kind == "failed":
        raise WorkerLost(f"has failed: {value}")
    return value


class Engine(Protocol):
    """Runs workers on this machine or a cluster."""

    def end(self) -> None:
        """Kill all workers."""

    def close(self) -> None:
        """Release the engine's resources, once no thread waits for a worker."""

    def open(self, evaluation: Evaluation) -> None:
        """Set the evaluation that workers open. Raises MachineError if the engine cannot be used."""

    def capacity(self) -> int:
        """Return how many workers may run now, beside this process. Raises MachineError if the engine is gone."""

    def put(self, value: Any) -> Any:
        """Return a handle of a value for many workers. Raises MachineError if there is no room."""

    def start(self, number: int) -> Worker:
        """Return a worker that is ready. Raises WorkerLost if it ended first."""


@dataclass
class _Pending:
    """A requested task; `losses` are workers lost with it, `result` its result or exception, None until finished."""

    task: Any
    running: bool = False
    losses: int = 0
    result: Any = None


class Executor:
    """Evaluates tasks in this process and in an engine's workers."""

    def __init__(self, engine: Engine, events: Events, hang_seconds: float = HANG_SECONDS) -> None:
        """Use an engine without starting workers; tasks below `hang_seconds` never count as hung."""
        self._engine = engine
        self._events = events
        self._hang_seconds = hang_seconds
        self._state = threading.Condition()
        self._tasks: list[_Pending] = []
        self._threads: list[threading.Thread] = []
        self._shared: Any = None
        self._slowest: float | None = None
        self._hardware = ""
        self._news: deque[tuple[str, str, dict[str, Any]]] = deque()
        self._closed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def open(self, evaluation: Evaluation, hardware: str) -> None:
        """Start workers, which load their model meanwhile. Raises MachineError."""
        self._hardware = hardware
        self._engine.open(evaluation)
        self._grow()

    def share(self, value: Any) -> None:
        """Send a value to every worker before its next task. Raises MachineError if the engine has no room."""
        self._shared = self._engine.put(value)

    def close(self) -> None:
        """Kill all workers."""
        with self._state:
            self._closed = True
            self._state.notify_all()
        self._engine.end()
        for thread in self._threads:
            thread.join()
        self._engine.close()

    def evaluate(self, tasks: Sequence[Any], here: Callable[[Any], Any], then: Sequence[Any] = ()) -> list[Any]:
        """Return the results of all tasks, in order. Raises WorkerOutOfMemory or MachineError.

        `here` evaluates a task in this process. Idle workers may start tasks of `then`, whose results are kept.
        """
        self._grow()
        wanted = [*tasks, *then]
        with self._state:
            known = [pending for pending in self._tasks if pending.task in wanted]
            known = [pending for pending in known if not isinstance(pending.result, BaseException)]
            self._tasks = [_find(known, task) or _Pending(task) for task in wanted]
            asked = self._tasks[: len(tasks)]
            self._state.notify_all()
        while (pending := self._next_for_this_process(asked)) is not None:
            started = time.monotonic()
            try:
                result = here(pending.task)
            except BaseException:
                with self._state:
                    pending.running = False
                raise
            self._finish(pending, result, started)
        self._tell_news()
        for pending in asked:
            if isinstance(pending.result, BaseException):
                raise pending.result
        return [pending.result for pending in asked]

    def _next_for_this_process(self, asked: Sequence[_Pending]) -> _Pending | None:
        """Wait for a free task; return None when all `asked` are done."""
        with self._state:
            while any(pending.result is None for pending in asked):
                free = next((one for one in self._tasks if one.result is None and not one.running), None)
                if free is not None:
                    free.running = True
                    return free
                self._state.wait()
                self._tell_news()
            return None

    def _finish(self, pending: _Pending, result: Any, started: float) -> None:
        with self._state:
            pending.result, pending.running = result, False
            self._slowest = max(self._slowest or 0.0, time.monotonic() - started)
            self._state.notify_all()

    def _grow(self) -> None:
        """Start a thread per worker that there is room for: machines may join at any time."""
        for number in range(len(self._threads), self._engine.capacity()):
            thread = threading.Thread(target=self._serve, args=(number + 1,), name=f"worker-{number + 1}", daemon=True)
            self._threads.append(thread)
            thread.start()

    def _serve(self, number: int) -> None:
        losses = 0
        while losses < MOST_LOSSES and not self._closed:
            time.sleep(_RESTART_SECONDS * losses)
            finished = 0
            try:
                worker = self._engine.start(number)
                try:
                    self._tell_started(number, worker.hardware)
                    for _ in self._results(worker):
                        finished += 1
                finally:
                    worker.end()
            except WorkerLost as lost:
                losses = 1 if finished else losses + 1
                self._tell_lost(number, lost, again=losses < MOST_LOSSES)

    def _results(self, worker: Worker) -> Iterator[None]:
        """Have a worker evaluate free tasks, yielding after each, until the executor is closed."""
        given: Any = None
        while (pending := self._next_for_worker()) is not None:
            started = time.monotonic()
            try:
                if (shared := self._shared) is not given:
                    worker.share(shared)
                    given = shared
                result = worker.evaluate(pending.task, self._limit())
            except WorkerLost:
                with self._state:
                    pending.running, pending.losses = False, pending.losses + 1
                    self._state.notify_all()
                raise
            except WorkerOutOfMemory as error:
                result = error
            self._finish(pending, result, started)
            yield

    def _next_for_worker(self) -> _Pending | None:
        """Wait for a free task; return None when the executor is closed."""
        with self._state:
            while not self._closed:
                for pending in self._tasks:
                    if pending.result is None and not pending.running and pending.losses < LOSSES_OF_A_TASK:
                        pending.running = True
                        return pending
                self._state.wait()
            return None

    def _limit(self) -> float | None:
        """Return after how many seconds a task hangs; None before the first measurement."""
        return None if self._slowest is None else max(self._hang_seconds, HANG_FACTOR * self._slowest)

    def _tell_started(self, number: int, hardware: str) -> None:
        line = f"worker {number} is ready"
        if hardware != self._hardware:
            line = f"warning: {line}, on {hardware}, but this process has {self._hardware}: trials may differ"
        self._news.append(("worker_started", line, {"worker": number, "hardware": hardware}))

    def _tell_lost(self, number: int, lost: WorkerLost, *, again: bool) -> None:
        if not self._closed:  # otherwise it was killed on purpose
            then = "a new worker replaces it" if again else "the other workers continue without it"
            self._news.append(("worker_lost", f"warning: worker {number} {lost}; {then}", {"worker": number}))

    def _tell_news(self) -> None:
        while self._news:
            event, message, fields = self._news.popleft()
            self._events.emit(event, message, **fields)


def _find(known: Sequence[_Pending], task: Any) -> _Pending | None:
    return next((pending for pending in known if pending.task == task), None)
