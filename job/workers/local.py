"""Worker processes on this machine, one per device or share of the CPU.

They start early, import their libraries and wait. Each has its own session, so Ctrl-C reaches only the run, which then
kills its workers. The kernel kills them with the thread that started them, so even `kill -9` of the run leaves no GPU
occupied.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from typing import Any

from job.text.redaction import guarded_output
from job.workers.executor import Evaluation, Evaluator, Outcome, WorkerLost, outcome_of, value_of

_PR_SET_PDEATHSIG = 1


class LocalEngine:
    """Worker processes of this machine."""

    def __init__(self, warm_up: Callable[[], None], count: int) -> None:
        """Start `count` processes, which run the pickled `warm_up`; more start on demand."""
        self._warm_up = warm_up
        self._lock = threading.Lock()
        self._running: list[LocalWorker] = []
        self._ended = False
        self._warm = [self._process(None) for _ in range(count)]
        self._devices: Sequence[str] = ()
        self._workers = 0
        self._evaluation = b""

    def end(self) -> None:
        """Kill all processes."""
        with self._lock:
            self._ended = True
            for worker in self._running:
                worker.end()

    def close(self) -> None:
        """Do nothing: there are only processes."""

    def use(self, workers: int, devices: Sequence[str]) -> None:
        """Set the number of workers and the CUDA devices they use in turn, from the second on."""
        self._workers, self._devices = workers, devices

    def open(self, evaluation: Evaluation) -> None:
        """Set the evaluation that workers open."""
        self._evaluation = pickle.dumps(evaluation)

    def capacity(self) -> int:
        """Return the number of workers."""
        return self._workers

    def put(self, value: Any) -> Any:
        """Return the value, which every worker is sent."""
        return value

    def start(self, number: int) -> LocalWorker:
        """Return a worker that is ready. Raises WorkerLost if it ended first."""
        device = self._devices[number % len(self._devices)] if self._devices else None
        # A process that has imported its libraries may have fixed its visible devices.
        worker = self._warm.pop() if self._warm and device is None else self._process(device)
        worker.begin(self._evaluation)
        return worker

    def _process(self, device: str | None) -> LocalWorker:
        with self._lock:  # one at a time: a process started while all are being killed would survive
            if self._ended:
                raise WorkerLost("is no longer needed")
            worker = LocalWorker(self._warm_up, device)
            self._running = [one for one in self._running if one.process.is_alive()] + [worker]
            return worker


class LocalWorker:
    """A worker process of this machine."""

    def __init__(self, warm_up: Callable[[], None], device: str | None) -> None:
        """Start it with only the given CUDA device visible; None: those of this process."""
        context = multiprocessing.get_context("spawn")
        self._line, theirs = context.Pipe()
        self.hardware = ""
        self.process: SpawnProcess = context.Process(target=_main, args=(theirs, warm_up, device), daemon=True)
        self.process.start()
        theirs.close()

    def begin(self, evaluation: bytes) -> None:
        """Open an evaluation in it. Raises WorkerLost if it ended before it was ready."""
        self.hardware = self._answer(evaluation, None)

    def share(self, value: Any) -> None:
        """Send a value through the pipe. Raises WorkerLost if the process is dead."""
        self._answer(pickle.dumps(("share", value)), None)

    def evaluate(self, task: Any, limit: float | None) -> Any:
        """Return a task's result. Raises WorkerLost on death or after `limit` seconds, or WorkerOutOfMemory."""
        return self._answer(pickle.dumps(("evaluate", task)), limit)

    def end(self) -> None:
        """Kill it."""
        self.process.kill()
        self.process.join()

    def _answer(self, message: bytes, limit: float | None) -> Any:
        try:
            self._line.send_bytes(message)
            if not self._line.poll(limit):
                raise WorkerLost(f"has hung: no result after {limit:.0f} s")
            outcome: Outcome = pickle.loads(self._line.recv_bytes())
        except (OSError, EOFError) as error:
            self.process.join()
            raise WorkerLost(f"has died (exit code {self.process.exitcode})") from error
        return value_of(outcome)


def _main(line: Connection, warm_up: Callable[[], None], device: str | None) -> None:
    os.setsid()
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if device is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = device
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    with guarded_output():
        try:
            warm_up()
            _serve(line)
        except EOFError:
            return  # the run has ended, or needs no workers
        except Exception:
            # The process still fails. Printed here, where secrets are redacted; multiprocessing would not redact them.
            traceback.print_exc()
            sys.exit(1)


def _serve(line: Connection) -> None:
    def answer(act: Callable[[], Any]) -> bool:
        outcome = outcome_of(act)
        line.send_bytes(pickle.dumps(outcome))
        return outcome[0] != "failed"

    evaluation: Evaluation = pickle.loads(line.recv_bytes())
    with ExitStack() as stack:
        opened: list[Evaluator] = []

        def open_it() -> str:
            opened.append(stack.enter_context(evaluation.opened()))
            return opened[0].hardware

        going = answer(open_it)
        while going:
            name, value = pickle.loads(line.recv_bytes())
            going = answer(partial(getattr(opened[0], name), value))
