"""Evaluate numbered tasks in this process and its workers, with any engine.

Tasks and results are values: which process evaluates one, when, and after how many attempts makes no difference. One
thread per worker hands it the next free task and waits; this process takes tasks from the same list, and does not wait
for a worker's first result. A worker that dies or hangs is replaced, and its task becomes free again
(docs/decisions/0015-workers.md).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self

from job.errors import MachineError
from job.storage.events import Events
from job.workers.worker import Engine, Evaluation, Worker, WorkerLost, WorkerOutOfMemory

# Stop restarting a worker after this many losses in a row without a result.
MOST_LOSSES = 3
# After this many lost workers a task is left to this process, which then meets the same fault.
LOSSES_OF_A_TASK = 2
# A task hangs after this many times the slowest task's time, and at least this many seconds.
HANG_FACTOR, HANG_SECONDS = 20.0, 120.0
_RESTART_SECONDS = 1.0


@dataclass
class _Pending:
    """A requested task.

    Attributes:
        running: How many processes evaluate it.
        is_first: Whether a worker evaluates it that has no result yet, and may be slow.
        losses: Workers lost with it.
        result: Its result or exception; None until finished.
    """

    task: Any
    running: int = 0
    is_first: bool = False
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
        """Send a value to every worker, at once. Raises MachineError if the engine has no room."""
        shared = self._engine.put(value)
        with self._state:
            self._shared = shared
            self._state.notify_all()

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

        `here` evaluates a task in this process. Idle workers may start tasks of `then`, for the next call.
        """
        self._grow()
        with self._state:
            known = [pending for pending in self._tasks if not isinstance(pending.result, BaseException)]
            self._tasks = [_find(known, task) or _Pending(task) for task in [*tasks, *then]]
            self._state.notify_all()
        asked = self._tasks[: len(tasks)]
        while (pending := self._next_here(asked)) is not None:
            self._evaluate(pending, here)
        for pending in asked:
            if isinstance(pending.result, BaseException):
                raise pending.result
        return [pending.result for pending in asked]

    def _next_here(self, asked: Sequence[_Pending]) -> _Pending | None:
        """Wait for a task to evaluate in this process; return None when all `asked` are done."""
        with self._state:
            while unfinished := [pending for pending in asked if pending.result is None]:
                ahead = [pending for pending in self._tasks if pending.result is None]
                free = [[pending for pending in some if not pending.running] for some in (unfinished, ahead)]
                # Whatever keeps a new worker, the batch ends no later than by this process alone.
                first = [pending for pending in unfinished if pending.is_first]
                for pending in (*free[0], *first, *free[1]):
                    pending.running += 1
                    return pending
                self._state.wait()
            return None

    def _evaluate(self, pending: _Pending, act: Callable[[Any], Any]) -> None:
        """Keep a task's result; raise what the act raises, unless memory was short in a worker."""
        started, result = time.monotonic(), None
        try:
            result = act(pending.task)
        except WorkerOutOfMemory as error:
            result = error
        except WorkerLost:
            pending.losses += 1
            raise
        finally:
            with self._state:
                pending.running -= 1
                if pending.result is None and result is not None:
                    pending.result = result
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
            try:
                with self._engine.worker(number) as worker:
                    self._tell_started(number, worker.hardware)
                    try:
                        self._employ(worker)
                    finally:
                        losses = 0 if worker.finished else losses
            except WorkerLost as lost:
                losses += 1
                self._tell_lost(number, lost, again=losses < MOST_LOSSES)

    def _employ(self, worker: Worker) -> None:
        """Have a worker evaluate free tasks until the executor is closed. Raises WorkerLost."""

        def evaluated(task: Any) -> Any:
            return worker.ask("evaluate", task, self._limit())

        given = None
        while not self._closed:
            if (shared := self._shared) is not given:
                worker.ask("share", shared)  # before it takes a task, which others can evaluate meanwhile
                given = shared
            pending = self._next_for(worker, given)
            if pending is not None:
                self._evaluate(pending, evaluated)
                worker.finished += 1

    def _next_for(self, worker: Worker, given: Any) -> _Pending | None:
        """Wait for a task for a worker; return None if there is something else to do."""
        with self._state:
            while not self._closed and self._shared is given:
                for pending in self._tasks:
                    if pending.result is None and not pending.running and pending.losses < LOSSES_OF_A_TASK:
                        pending.running, pending.is_first = 1, worker.finished == 0
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
        self._tell("worker_started", line, worker=number, hardware=hardware)

    def _tell_lost(self, number: int, lost: WorkerLost, *, again: bool) -> None:
        if not self._closed:  # otherwise it was killed on purpose
            then = "a new worker replaces it" if again else "the other workers continue without it"
            self._tell("worker_lost", f"warning: worker {number} {lost}; {then}", worker=number)

    def _tell(self, event: str, message: str, **fields: Any) -> None:
        try:
            self._events.emit(event, message, **fields)
        except MachineError:
            return  # this process's next event meets the same fault


def _find(known: Sequence[_Pending], task: Any) -> _Pending | None:
    return next((pending for pending in known if pending.task == task), None)
