"""Workers on this machine: real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest

from job.storage.events import Events
from job.workers import executor as executor_module
from job.workers.executor import Executor
from job.workers.local import LocalEngine
from job.workers.worker import WorkerLost, WorkerOutOfMemory
from tests.fakes.evaluations import Do, Doing, nothing, touch
from tests.helpers import wait_until, worker_processes


@pytest.fixture
def engine() -> Iterator[LocalEngine]:
    made = LocalEngine(nothing, 1)
    made.use(1, [])
    made.open(Doing())
    yield made
    made.end()


def asked(engine: LocalEngine, what: str, limit: float | None = 60, number: int = 1) -> Any:
    with engine.worker(number) as worker:
        return worker.ask("evaluate", Do(what), limit)


def test_a_worker_evaluates_shares_and_says_that_memory_does_not_suffice(engine: LocalEngine) -> None:
    with engine.worker(1) as worker:
        assert worker.hardware == "abacus"
        assert worker.ask("evaluate", Do("square", 7), 60) == 49
        worker.ask("share", {"basis": [1, 2]})
        assert worker.ask("evaluate", Do("shared"), 60) == {"basis": [1, 2]}
        with pytest.raises(WorkerOutOfMemory, match="2 GiB"):
            worker.ask("evaluate", Do("memory"), 60)
        assert worker.ask("evaluate", Do("square", 3), 60) == 9  # it continues
    assert worker_processes(os.getpid()) == []


def test_what_becomes_of_a_worker_is_told(engine: LocalEngine) -> None:
    with pytest.raises(WorkerLost, match=r"has died \(exit code -9\)"):
        asked(engine, "die")
    with pytest.raises(WorkerLost, match="has failed: the model's files have changed"):
        asked(engine, "error")
    with pytest.raises(WorkerLost, match="has hung: no result after 1 s"):
        asked(engine, "hang", 0.6)
    for reason in ("the model cannot be loaded there", "2 GiB are too few"):
        engine.open(Doing(fails=reason))
        with pytest.raises(WorkerLost, match=f"has failed: {reason}"):
            asked(engine, "pid")
    engine.open(Doing(shares=False))
    with engine.worker(1) as worker, pytest.raises(WorkerLost, match="has failed: 2 GiB are too few"):
        worker.ask("share", "basis")
    assert worker_processes(os.getpid()) == []


def test_a_worker_that_is_stopped_is_replaced_and_its_task_done(
    engine: LocalEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(executor_module, "HANG_FACTOR", 1.0)
    stopped: list[int] = []
    at_work = threading.Event()

    def here(task: Do) -> int:
        if not stopped:
            (process,) = [one for one in worker_processes(os.getpid()) if one.status() != psutil.STATUS_ZOMBIE]
            at_work.wait(0.5)
            process.send_signal(signal.SIGSTOP)
            stopped.append(process.pid)
        return task.number**2

    with Executor(engine, Events(), hang_seconds=0.5) as executor:
        executor.open(Doing(), "abacus")
        for first in (0, 40, 80):
            tasks = [Do("square", number) for number in range(first, first + 40)]
            assert executor.evaluate(tasks, here) == [task.number**2 for task in tasks]
    assert not psutil.pid_exists(stopped[0])


def test_processes_warm_up_before_there_is_work(tmp_path: Path) -> None:
    engine = LocalEngine(partial(touch, tmp_path / "warm"), 2)
    try:
        wait_until((tmp_path / "warm").exists)
        assert len(worker_processes(os.getpid())) == 2
    finally:
        engine.end()
    assert worker_processes(os.getpid()) == []


def test_a_worker_on_a_device_sees_that_one_alone_and_none_that_has_warmed_up(engine: LocalEngine) -> None:
    engine.use(2, ["3", "5", "7"])
    (warm,) = worker_processes(os.getpid())
    seen = [asked(engine, "environment", number=number)["CUDA_VISIBLE_DEVICES"] for number in (1, 2)]
    assert seen == ["5", "7"]
    assert warm in worker_processes(os.getpid())


def test_workers_end_with_the_process_that_started_them_however_it_ends() -> None:
    script = (
        "from job.workers.local import LocalEngine; from tests.fakes.evaluations import *; import sys\n"
        "if __name__ == '__main__':\n"
        "    engine = LocalEngine(nothing, 2); engine.use(2, []); engine.open(Doing())\n"
        "    with engine.worker(1): print(flush=True); sys.stdin.read()"
    )
    run = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert run.stdout is not None
    run.stdout.readline()
    orphans = worker_processes(run.pid)
    assert len(orphans) == 2
    run.kill()
    run.communicate()
    psutil.wait_procs(orphans, timeout=20)
    assert not any(orphan.is_running() for orphan in orphans)


def test_a_worker_has_a_session_of_its_own(engine: LocalEngine) -> None:
    """Ctrl-C on a terminal reaches all processes of its group; only the run may get it, which ends its workers."""
    with engine.worker(1) as worker:
        assert os.getsid(worker.ask("evaluate", Do("pid"), 60)) != os.getsid(0)


def test_nothing_is_started_once_all_are_ended() -> None:
    engine = LocalEngine(nothing, 0)
    engine.open(Doing())
    engine.end()
    with pytest.raises(WorkerLost, match="no longer needed"), engine.worker(1):
        pass
    assert worker_processes(os.getpid()) == []


def test_whoever_waits_for_a_worker_is_told_that_all_are_ended(engine: LocalEngine) -> None:
    threading.Timer(0.5, engine.end).start()
    began = time.monotonic()
    with pytest.raises(WorkerLost):
        asked(engine, "hang", None)
    assert time.monotonic() - began < 60
    assert worker_processes(os.getpid()) == []
