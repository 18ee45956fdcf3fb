"""Workers on a Ray cluster: actors on any number of machines, each with the model loaded once.

The cluster is a running one, or one of this machine that starts and ends with the run. Anyone who reaches a cluster's
ports can run code on it: it requires a token, and one started here listens on the loopback interface only.
"""

from __future__ import annotations

import os
import secrets
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from importlib.metadata import version
from typing import Any

from job.errors import MachineError, UsageError
from job.system.extras import require_extra
from job.system.tempdirs import scratch
from job.text.redaction import guarded_output
from job.workers.executor import Evaluation, Evaluator, Outcome, WorkerLost, outcome_of, value_of

# Seconds between checks of a waiting thread.
_LOOK_SECONDS = 0.5
# Seconds that a cluster may be unreachable. Ray itself ends a process whose cluster is gone for a minute.
_GONE_SECONDS = 20.0
_AGAIN = "run again to continue: on a new cluster, with another --address, or with --engine local"


class RayEngine:
    """Actors of a Ray cluster."""

    def __init__(self, address: str | None) -> None:
        """Take a cluster's HOST:PORT or "auto"; None means RAY_ADDRESS's, else a new one on this machine."""
        self._address = _cluster_address(address)
        self._workers: int | None = None
        self._resources: dict[str, int] = {}
        self._open = ExitStack()
        self._ended = threading.Event()
        self._actors: list[Any] = []
        self._evaluation: Any = None
        self._node = ""
        self._gpus: frozenset[str] = frozenset()
        self._gcs = ("", 0)
        self._last_seen = 0.0

    def use(self, workers: int | None, *, gpus: int, cpus: int) -> None:
        """Set the number of workers besides this process (None fills the cluster), and their GPUs and CPU cores."""
        self._workers, self._resources = workers, {"num_gpus": gpus, "num_cpus": cpus}

    def open(self, evaluation: Evaluation) -> None:
        """Connect to or start the cluster, and upload the evaluation. Raises UsageError or MachineError."""
        cpus = self._resources["num_cpus"] * (self._workers or 1)
        self._open.enter_context(_connected(self._address, cpus))
        context = ray_module().get_runtime_context()
        host, _, port = context.gcs_address.rpartition(":")
        self._gcs, self._last_seen = (host, int(port)), time.monotonic()
        self._node, self._gpus = context.get_node_id(), visible_gpus(self._resources["num_gpus"])
        self._evaluation = self.put(evaluation)

    def end(self) -> None:
        """Kill all actors."""
        self._ended.set()
        for actor in self._actors:
            self._kill(actor)

    def _kill(self, actor: Any) -> None:
        if not self._answers():
            return  # the call would block, and no actor survives its cluster
        ray = ray_module()
        try:
            ray.kill(actor)
        except (ray.exceptions.RayError, ValueError):
            return  # it is dead

    def close(self) -> None:
        """Leave the cluster, or end it if it was started here."""
        self._open.close()

    def capacity(self) -> int:
        """Return how many workers may run now. Raises MachineError if the cluster is gone."""
        self._require_cluster()
        if self._workers is not None:
            return self._workers
        alive = [node["Resources"] for node in ray_module().nodes() if node["Alive"]]
        return max(0, sum(map(self._room, alive)) - 1)  # one of them is this process

    def _room(self, node: dict[str, float]) -> int:
        needed = {"GPU": self._resources["num_gpus"], "CPU": self._resources["num_cpus"]}
        return int(min(node.get(name, 0) // count for name, count in needed.items() if count))

    def put(self, value: Any) -> Any:
        """Put a value into the cluster's object store; return a reference. Raises MachineError if it is full."""
        errors = ray_module().exceptions
        try:
            return ray_module().put(value)
        except (errors.ObjectStoreFullError, errors.OutOfDiskError) as error:
            raise MachineError(
                f"the Ray cluster has no memory left for the job's data: {_last_line(error)}",
                remedy="start the cluster with a larger --object-store-memory, or free the disk that it spills to",
            ) from error

    def start(self, number: int) -> RayWorker:
        """Return an actor with a loaded model, once the cluster has room. Raises WorkerLost if it ended first.

        An actor on this process's own device stays idle, to keep the device from other actors.
        """
        options = {"max_restarts": 0, "max_task_retries": 0, "scheduling_strategy": "SPREAD", **self._resources}
        while True:
            while not self._answers():  # calls to a dead cluster block until Ray ends this process
                self._require_wanted()
                time.sleep(_LOOK_SECONDS)
            actor = ray_module().remote(**options)(_Actor).remote()
            self._actors.append(actor)
            worker = RayWorker(actor, self._require_wanted, self._kill)
            try:
                if not self._is_own(*worker.asked("place", None)):
                    worker.hardware = worker.asked("begin", None, self._evaluation, version("abliteration-job"))
                    return worker
            except WorkerLost:
                worker.end()
                raise

    def _is_own(self, node: str, gpus: frozenset[str]) -> bool:
        """Return whether a node and GPUs are those that this process uses."""
        if node != self._node:
            return False
        return bool(gpus & self._gpus) if self._resources["num_gpus"] else self._workers is None

    def _require_wanted(self) -> None:
        """Raise WorkerLost if waiting for a worker is pointless."""
        if self._ended.is_set():
            raise WorkerLost("is no longer needed")
        try:
            self._require_cluster()
        except MachineError as error:
            raise WorkerLost(str(error)) from error

    def _require_cluster(self) -> None:
        if self._answers():
            self._last_seen = time.monotonic()
        elif time.monotonic() - self._last_seen > _GONE_SECONDS:
            raise MachineError(f"the Ray cluster at {self._gcs[0]}:{self._gcs[1]} is gone", remedy=_AGAIN)

    def _answers(self) -> bool:
        try:
            with socket.create_connection(self._gcs, timeout=_LOOK_SECONDS):
                return True
        except OSError:
            return False


class RayWorker:
    """An actor of a Ray cluster."""

    def __init__(self, actor: Any, require_wanted: Callable[[], None], kill: Callable[[Any], None]) -> None:
        """`require_wanted` raises WorkerLost if waiting is pointless."""
        self._actor = actor
        self._require_wanted = require_wanted
        self._kill = kill
        self.hardware = ""

    def share(self, value: Any) -> None:
        """Send the actor a value from `RayEngine.put`. Raises WorkerLost if it is dead."""
        self.asked("share", None, value)

    def evaluate(self, task: Any, limit: float | None) -> Any:
        """Return a task's result. Raises WorkerLost on death or after `limit` seconds, or WorkerOutOfMemory."""
        return self.asked("evaluate", limit, task)

    def end(self) -> None:
        """Kill it."""
        self._kill(self._actor)

    def asked(self, method: str, limit: float | None, *arguments: Any) -> Any:
        """Call a method remotely. Raises WorkerLost on death or after `limit` seconds, or WorkerOutOfMemory."""
        ray, started = ray_module(), time.monotonic()
        try:
            answer = getattr(self._actor, method).remote(*arguments)
            while not ray.wait([answer], timeout=_LOOK_SECONDS)[0]:
                self._require_wanted()
                if limit is not None and time.monotonic() - started > limit:
                    raise WorkerLost(f"has hung: no result after {limit:.0f} s")
            outcome: Outcome = ray.get(answer)
        except ray.exceptions.RayError as error:
            raise WorkerLost(f"is lost: {_last_line(error)}") from error
        return value_of(outcome)


class _Actor:
    """The worker's side: holds an evaluator."""

    def __init__(self) -> None:
        self._open = ExitStack()
        self._open.enter_context(guarded_output())  # Ray keeps printed output in files
        self._evaluator: Evaluator | None = None

    def place(self) -> Outcome:
        return "result", (ray_module().get_runtime_context().get_node_id(), visible_gpus())

    def begin(self, evaluation: Evaluation, of_version: str) -> Outcome:
        own = version("abliteration-job")
        if own != of_version:
            return "failed", f"abliteration-job {own} is installed there, but {of_version} here"

        def opened() -> str:
            self._evaluator = self._open.enter_context(evaluation.opened())
            return self._evaluator.hardware

        return outcome_of(opened)

    def share(self, value: Any) -> Outcome:
        return self._call("share", value)

    def evaluate(self, task: Any) -> Outcome:
        return self._call("evaluate", task)

    def _call(self, name: str, value: Any) -> Outcome:
        return outcome_of(partial(getattr(self._evaluator, name), value))


def _cluster_address(given: str | None) -> str | None:
    """Return a cluster's address, or None to start one, restricted to the loopback interface.

    Otherwise Ray's processes listen on all interfaces, whatever the node's address. Must run before Ray is imported.
    """
    address = given or os.environ.get("RAY_ADDRESS")
    if address is None:
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    return address


def ray_module() -> Any:
    """Import Ray with tokens, without telemetry or automatic connection. Raises UsageError if missing."""
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    os.environ.update(RAY_USAGE_STATS_ENABLED="0", RAY_ENABLE_AUTO_CONNECT="0")
    require_extra("ray", "engine = ray")
    import ray

    return ray


def reached_cluster(address: str | None) -> str:
    """Return Ray's version and cluster in words, starting nothing. Raises UsageError or MachineError."""
    address = _cluster_address(address)
    ray = f"Ray {ray_module().__version__}"
    if address is None:
        return f"{ray}, to be started on this machine"
    host, _, port = address.rpartition(":")
    if address == "auto":
        return f"{ray}, the cluster of this machine"
    if not host or not port.isdigit():
        raise UsageError(f"{address!r} is not the address of a Ray cluster", remedy="give HOST:PORT, or auto")
    try:
        with socket.create_connection((host, int(port)), timeout=_GONE_SECONDS):
            return f"{ray}, a cluster that answers at {address}"
    except OSError as error:
        raise MachineError(
            f"no Ray cluster answers at {address}: {error}", remedy="start the cluster, or correct the address"
        ) from error


@contextmanager
def _connected(address: str | None, cpus: int) -> Iterator[None]:
    """Connect within the block to a cluster, or to a new local one with at least `cpus` CPUs."""
    ray, options = ray_module(), dict[str, Any]()
    with ExitStack() as stack:
        if address is None:
            os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
            options["_temp_dir"] = str(stack.enter_context(scratch("ray")))
            options |= {"include_dashboard": False, "num_cpus": max(cpus, os.cpu_count() or 1)}
            # By default actors have low priority, and get no CPU on a busy machine.
            options["_system_config"] = {"worker_niceness": 0}
        with _signals_kept():
            try:
                ray.init(address or "local", log_to_driver=False, logging_level="ERROR", **options)
            except (ray.exceptions.RayError, OSError, RuntimeError, ValueError) as error:
                what = f"cluster at {address} cannot be reached" if address else "cluster cannot be started"
                raise MachineError(
                    f"a Ray {what}: {_last_line(error)}",
                    remedy="check that it runs and that RAY_AUTH_TOKEN or ~/.ray/auth_token here holds its token",
                ) from error
        try:
            yield
        finally:
            with _signals_kept():
                ray.shutdown()


@contextmanager
def _signals_kept() -> Iterator[None]:
    """Restore signal handlers after the block: Ray replaces them."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def visible_gpus(count: int | None = None) -> frozenset[str]:
    """Return the visible GPUs, or the first `count`; by UUID where CUDA reports it."""
    import torch

    if torch.cuda.is_available():
        names = [str(torch.cuda.get_device_properties(index).uuid) for index in range(torch.cuda.device_count())]
    else:
        names = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return frozenset(names[:count])


def _last_line(error: BaseException) -> str:
    """Return the last line of an error: Ray puts the remote trace before it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
