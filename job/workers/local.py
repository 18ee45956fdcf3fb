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
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from typing import Any

from job.text.redaction import guarded_output
from job.workers.worker import Engine, Evaluation, Host, Worker, WorkerLost, hung, result_of

_PR_SET_PDEATHSIG = 1


class LocalEngine(Engine):
    """Worker processes of this machine."""

    def __init__(self, warm_up: Callable[[], None], count: int) -> None:
        """Start `count` processes, which run the pickled `warm_up`; more start on demand."""
        super().__init__()
        self._warm_up = warm_up
        self._warm = {number: LocalWorker(warm_up, None) for number in range(1, count + 1)}
        self._running.update(self._warm.values())
        self._devices: Sequence[str] = ()
        self._workers = 0
        self._evaluation: Evaluation | None = None

    def use(self, workers: int, devices: Sequence[str]) -> None:
        """Set the number of workers and the CUDA devices they use in turn, from the second on."""
        self._workers, self._devices = workers, devices

    def open(self, evaluation: Evaluation) -> None:
        """Set the evaluation that workers open."""
        self._evaluation = evaluation

    def capacity(self) -> int:
        """Return the number of workers."""
        return self._workers

    @contextmanager
    def worker(self, number: int) -> Iterator[Worker]:
        """Yield a process that is ready. Raises WorkerLost if it ends first."""
        device = self._devices[number % len(self._devices)] if self._devices else None
        # A process that has imported its libraries may have fixed its visible devices.
        warm = self._warm.pop(number, None) if device is None else None
        with self._kept(warm or LocalWorker(self._warm_up, device)) as worker:
            worker.hardware = worker.ask("begin", self._evaluation)
            yield worker


class LocalWorker(Worker):
    """A worker process of this machine."""

    def __init__(self, warm_up: Callable[[], None], device: str | None) -> None:
        """Start it with only the given CUDA device visible; None: those of this process."""
        super().__init__()
        context = multiprocessing.get_context("spawn")
        self._line, theirs = context.Pipe()
        self._process: SpawnProcess = context.Process(target=_main, args=(theirs, warm_up, device), daemon=True)
        self._process.start()
        theirs.close()

    def ask(self, method: str, value: Any, limit: float | None = None) -> Any:
        """Return its answer. Raises WorkerOutOfMemory, or WorkerLost on death or after `limit` seconds."""
        try:
            # Pickled here: `Connection.send` would pass tensors as shared memory.
            self._line.send_bytes(pickle.dumps((method, value)))
            if limit is not None and not self._line.poll(limit):
                raise hung(limit)
            return result_of(pickle.loads(self._line.recv_bytes()))
        except (OSError, EOFError) as error:
            self._process.join()
            raise WorkerLost(f"has died (exit code {self._process.exitcode})") from error

    def end(self) -> None:
        """Kill it."""
        self._process.kill()
        self._process.join()


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
            with ExitStack() as resources:
                host, answer = Host(resources), None
                while not isinstance(answer, WorkerLost):
                    answer = host.answer(*pickle.loads(line.recv_bytes()))
                    line.send_bytes(pickle.dumps(answer))
        except EOFError:
            return  # the run has ended, or needs no workers
        except Exception:
            # The process still fails. Printed here, where secrets are redacted; multiprocessing would not redact them.
            traceback.print_exc()
            sys.exit(1)
