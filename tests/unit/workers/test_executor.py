"""The executor: results in order, whichever worker evaluates what and whichever dies."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from job.errors import MachineError
from job.storage.events import Events
from job.workers import executor as module
from job.workers.executor import MOST_LOSSES, Executor
from job.workers.worker import Engine, Worker, WorkerLost, WorkerOutOfMemory
from tests.helpers import wait_until

Evaluate = Callable[[Any], Any]


class ThreadWorker(Worker):
    """A worker that is a function of this process."""

    def __init__(self, evaluate: Evaluate, hardware: str, prepare: Callable[[], Any]) -> None:
        super().__init__()
        self._prepare = prepare
        self._evaluate = evaluate
        self.hardware = hardware
        self.shared: list[Any] = []
        self.seen: list[tuple[Any, Any]] = []  # tasks, each with the value shared last before it

    def end(self) -> None:
        pass

    def ask(self, method: str, value: Any, limit: float | None = None) -> Any:
        if method == "share":
            self.shared.append(value)
            return self._prepare()
        self.seen.append((value, self.shared[-1] if self.shared else None))
        return self._evaluate(value)


class ThreadEngine(Engine):
    """Workers in threads of this process, to test ordering only; real processes have their own tests."""

    def __init__(
        self,
        evaluate: Evaluate,
        workers: int = 1,
        hardware: str = "abacus",
        prepare: Callable[[], Any] = lambda: None,
    ) -> None:
        super().__init__()
        self._evaluate = evaluate
        self.workers = workers
        self._hardware = hardware
        self._prepare = prepare
        self.started: list[ThreadWorker] = []
        self.gone = False

    def open(self, evaluation: Any) -> None:
        pass

    def capacity(self) -> int:
        if self.gone:
            raise MachineError("the engine is gone")
        return self.workers

    @contextmanager
    def worker(self, number: int) -> Iterator[Worker]:
        worker = ThreadWorker(self._evaluate, self._hardware, self._prepare)
        self.started.append(worker)
        yield worker


@pytest.fixture(autouse=True)
def _restart_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_RESTART_SECONDS", 0.0)


@contextmanager
def opened(engine: ThreadEngine, events: Events | None = None) -> Iterator[Executor]:
    with Executor(engine, events or Events()) as executor:
        executor.open(None, "abacus")  # type: ignore[arg-type]  # the engine does not look at it
        yield executor


def squared(task: int) -> int:
    return task * task


def prove(executor: Executor, engine: ThreadEngine, *, first: int = 1000) -> None:
    """Have the worker return a first result."""
    while not engine.started or not engine.started[0].finished:
        first += 1
        executor.evaluate([first], squared, then=[-first])
        time.sleep(0.001)


def test_results_come_in_the_order_of_tasks_whoever_evaluates_them() -> None:
    free = threading.Semaphore(0)
    by_worker: list[int] = []
    done: list[int] = []

    def slowly(task: int) -> int:
        if abs(task) < 1000:
            by_worker.append(task)
            free.acquire()
        return task * task

    def here(task: int) -> int:
        while not by_worker:  # the worker is busy with a task meanwhile
            pass
        if len(by_worker) + len(done) == 4:
            free.release()
        done.append(task)
        return task * task

    engine = ThreadEngine(slowly)
    with opened(engine) as executor:
        prove(executor, engine)
        assert executor.evaluate([3, 1, 2, 5, 4], here) == [9, 1, 4, 25, 16]
    assert sorted(done + by_worker) == [1, 2, 3, 4, 5]
    assert len(by_worker) == 1


def test_no_batch_waits_for_a_workers_first_result() -> None:
    began, go_on, done = threading.Event(), threading.Event(), list[int]()

    def slowly(task: int) -> int:
        began.set()
        go_on.wait(10)
        return task * task

    def here(task: int) -> int:
        began.wait()
        done.append(task)
        return task * task

    engine = ThreadEngine(slowly)
    with opened(engine) as executor:
        assert executor.evaluate([1, 2], here, then=[3]) == [1, 4]
        assert sorted(done) == [1, 2]  # one of them twice, and nothing of what comes then
        go_on.set()
        wait_until(lambda: engine.started[0].finished >= 1, seconds=5)
        assert executor.evaluate([1, 2], here) == [1, 4]
        assert len(done) == 2


def test_a_worker_prepares_before_it_takes_a_task() -> None:
    go_on = threading.Event()
    engine = ThreadEngine(squared, prepare=lambda: go_on.wait(10))
    with opened(engine) as executor:
        executor.share("basis")
        wait_until(lambda: bool(engine.started and engine.started[0].shared), seconds=5)  # without any task
        done: list[int] = []
        assert executor.evaluate([1, 2], lambda task: done.append(task) or task * task) == [1, 4]
        assert done == [1, 2]
        assert engine.started[0].seen == []
        go_on.set()


def test_whoever_is_free_begins_with_what_comes_then_and_it_is_not_done_again() -> None:
    began, go_on, done = threading.Event(), threading.Event(), list[int]()

    def slowly(task: int) -> int:
        if abs(task) < 1000:
            began.set()
            go_on.wait()
        return task * task

    def here(task: int) -> int:
        began.wait()
        done.append(task)
        if len(done) == 3:
            go_on.set()
        return task * task

    engine = ThreadEngine(slowly)
    with opened(engine) as executor:
        prove(executor, engine)
        assert executor.evaluate([1, 2], here, then=[3, 4]) == [1, 4]
        assert len(done) == 3
        assert executor.evaluate([3, 4], here) == [9, 16]
        assert len(done) == 3
        # The same task under other conditions is a different one.
        assert executor.evaluate([5], here) == [25]


def test_a_lost_workers_task_goes_to_another_and_the_worker_is_replaced(tmp_path: Path) -> None:
    lost, found = threading.Event(), threading.Event()

    def once(task: int) -> int:
        if not lost.is_set():
            lost.set()
            raise WorkerLost("has died (exit code -9)")
        found.set()
        return task * task

    def here(task: int) -> int:
        found.wait()
        return task * task

    events, log = Events(), tmp_path / "events.jsonl"
    events.log_to(log)
    engine = ThreadEngine(once)
    with opened(engine, events) as executor:
        assert executor.evaluate([1, 2, 3], here) == [1, 4, 9]
        assert len(engine.started) == 2
    told = [json.loads(line) for line in log.read_text().splitlines()]
    (loss,) = [event for event in told if event["event"] == "worker_lost"]
    assert loss["message"] == "warning: worker 1 has died (exit code -9); a new worker replaces it"
    assert [event["event"] for event in told].count("worker_started") == 2


def test_a_worker_that_is_lost_every_time_is_given_up_and_a_task_that_loses_workers_is_left_to_this_process() -> None:
    given: list[int] = []

    def deadly(task: int) -> int:
        given.append(task)
        raise WorkerLost("has died")

    def here(task: int) -> int:
        while len(given) < MOST_LOSSES:
            pass
        return task * task

    engine = ThreadEngine(deadly)
    with opened(engine) as executor:
        assert executor.evaluate([1, 2, 3], here) == [1, 4, 9]
        assert len(engine.started) == MOST_LOSSES
        assert max(given.count(task) for task in given) <= 2
        assert executor.evaluate([4], squared) == [16]  # continues without it


def test_a_worker_out_of_memory_is_told_and_the_task_can_be_asked_again() -> None:
    full = threading.Event()

    def once(task: int) -> int:
        if full.is_set():
            return task
        full.set()
        raise WorkerOutOfMemory("2 GiB are too few")

    def here(task: int) -> int:
        full.wait()
        return task

    with opened(ThreadEngine(once)) as executor:
        with pytest.raises(WorkerOutOfMemory, match="2 GiB"):
            executor.evaluate([1, 2], here)
        assert executor.evaluate([1, 2], here) == [1, 2]


def test_what_fails_here_is_raised_and_the_task_is_free_again() -> None:
    def fails(task: int) -> int:
        raise ValueError("no such edit")

    with opened(ThreadEngine(squared, workers=0)) as executor:
        with pytest.raises(ValueError, match="no such edit"):
            executor.evaluate([1], fails)
        assert executor.evaluate([1], squared) == [1]


def test_shared_values_reach_every_worker_before_its_next_task() -> None:
    engine = ThreadEngine(squared)

    def here(task: int) -> int:
        while not any(engine.started) or len(engine.started[0].seen) < rounds:
            pass
        return task * task

    with opened(engine) as executor:
        for rounds, value in enumerate(("basis", "another"), 1):
            executor.share(value)
            executor.evaluate([2 * rounds, 2 * rounds + 1], here)
        (worker,) = engine.started
    assert worker.shared == ["basis", "another"]
    assert {value for _, value in worker.seen} == {"basis", "another"}


def test_workers_that_join_are_used_from_the_next_batch_on() -> None:
    joined = threading.Event()

    def helps(task: int) -> int:
        joined.set()
        return task * task

    engine = ThreadEngine(helps, workers=0)
    with opened(engine) as executor:
        executor.evaluate([1, 2], squared)
        engine.workers = 1
        assert executor.evaluate([3, 4], lambda task: joined.wait() and task * task) == [9, 16]


def test_an_engine_that_is_gone_ends_the_search() -> None:
    engine = ThreadEngine(squared)
    with opened(engine) as executor:
        engine.gone = True
        with pytest.raises(MachineError, match="gone"):
            executor.evaluate([1], squared)


def test_other_hardware_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    began = threading.Event()

    def helps(task: int) -> int:
        began.set()
        return task

    with opened(ThreadEngine(helps, hardware="slide rule")) as executor:
        executor.evaluate([1, 2], lambda task: began.wait() and task)
    assert "warning: worker 1 is ready, on slide rule, but this process has abacus" in capsys.readouterr().err


@pytest.mark.parametrize(("slowest", "limit"), [(None, None), (0.1, 120.0), (60.0, 1200.0)])
def test_what_hangs_follows_from_what_was_measured(slowest: float | None, limit: float | None) -> None:
    executor = Executor(ThreadEngine(squared), Events())
    executor._slowest = slowest
    assert executor._limit() == limit
