"""Workers on this machine: processes, one for every device or share of the CPU.

They are started before there is work, load what takes seconds to import, and wait. A process has a session of its own:
Ctrl-C is for the run, which then ends its workers; and the kernel ends them with the thread that started them, so that
not even `kill -9` of the run leaves a GPU occupied.
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
    """Processes of this machine."""

    def __init__(self, warm_up: Callable[[], None], count: int) -> None:
        """Start so many processes at once, which warm up; more are started as they are needed.

        Args:
            warm_up: What they do before there is work; pickled.
            count: How many.
        """
        self._warm_up = warm_up
        self._lock = threading.Lock()
        self._running: list[LocalWorker] = []
        self._ended = False
        self._warm = [self._process(None) for _ in range(count)]
        self._devices: Sequence[str] = ()
        self._workers = 0
        self._evaluation = b""

    def end(self) -> None:
        """End all processes at once."""
        with self._lock:
            self._ended = True
            for worker in self._running:
                worker.end()

    def close(self) -> None:
        """Let go of nothing more: all that there was were processes."""

    def use(self, workers: int, devices: Sequence[str]) -> None:
        """Set how many there are to be, and what CUDA calls the devices that they take in turn, from the second on."""
        self._workers, self._devices = workers, devices

    def open(self, evaluation: Evaluation) -> None:
        """Take what workers evaluate with."""
        self._evaluation = pickle.dumps(evaluation)

    def capacity(self) -> int:
        """Return how many workers there are to be."""
        return self._workers

    def put(self, value: Any) -> Any:
        """Return the value, which every worker is sent."""
        return value

    def start(self, number: int) -> LocalWorker:
        """Return a worker that is ready.

        Raises:
            WorkerLost: It ended before it was.
        """
        device = self._devices[number % len(self._devices)] if self._devices else None
        # A process that has loaded its libraries may have settled which devices it sees.
        worker = self._warm.pop() if self._warm and device is None else self._process(device)
        worker.begin(self._evaluation)
        return worker

    def _process(self, device: str | None) -> LocalWorker:
        with self._lock:  # one at a time: what is started while all are ended would be left
            if self._ended:
                raise WorkerLost("is not needed any more")
            worker = LocalWorker(self._warm_up, device)
            self._running = [one for one in self._running if one.process.is_alive()] + [worker]
            return worker


class LocalWorker:
    """A process of this machine."""

    def __init__(self, warm_up: Callable[[], None], device: str | None) -> None:
        """Start it.

        Args:
            warm_up: What it does before there is work.
            device: What CUDA calls the only device that it sees; None: it sees what this process sees.
        """
        context = multiprocessing.get_context("spawn")
        self._line, theirs = context.Pipe()
        self.hardware = ""
        self.process: SpawnProcess = context.Process(target=_main, args=(theirs, warm_up, device), daemon=True)
        self.process.start()
        theirs.close()

    def begin(self, evaluation: bytes) -> None:
        """Have it open an evaluation.

        Raises:
            WorkerLost: It ended before it was ready.
        """
        self.hardware = self._answer(evaluation, None)

    def share(self, value: Any) -> None:
        """Give it a value.

        Raises:
            WorkerLost: It is dead.
        """
        self._answer(pickle.dumps(("share", value)), None)

    def evaluate(self, task: Any, limit: float | None) -> Any:
        """Return the result of a task.

        Raises:
            WorkerLost: It died, or took longer than so many seconds.
            WorkerOutOfMemory: Its memory does not suffice.
        """
        return self._answer(pickle.dumps(("evaluate", task)), limit)

    def end(self) -> None:
        """End it at once."""
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
    """Work until the other end of the line is closed."""
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
            # Nothing is hidden: the process fails. Printed here, where secrets are redacted; multiprocessing would not.
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
