"""Workers on a Ray cluster: actors on any number of machines, each with the model loaded once.

The cluster is a running one, or one of this machine that starts and ends with the run. Anyone who reaches a cluster's
ports can run code on it: it requires a token, and one started here listens on the loopback interface only.
"""

from __future__ import annotations

import os
import secrets
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from typing import Any

from job.errors import MachineError
from job.system.extras import require_extra
from job.system.tempdirs import scratch
from job.text.redaction import guarded_output
from job.workers.worker import Engine, Evaluation, Host, Worker, WorkerLost, hung, result_of

# Seconds between checks of a waiting thread.
_LOOK_SECONDS = 0.5
# Seconds that a cluster may be unreachable. Ray itself ends a process whose cluster is gone for a minute.
GONE_SECONDS = 20.0
_AGAIN = "run again to continue: on a new cluster, with another --address, or with --engine local"


class RayEngine(Engine):
    """Actors of a Ray cluster."""

    def __init__(self, address: str | None) -> None:
        """Take a cluster's HOST:PORT or "auto"; None means RAY_ADDRESS's, else a new one on this machine."""
        super().__init__()
        self._address = cluster_address(address)
        self._workers: int | None = None
        self._needs: dict[str, int] = {}
        self._evaluation: Any = None
        self._node = ""
        self._gcs = ("", 0)
        self._last_seen = 0.0

    def use(self, workers: int | None, *, gpus: int, cpus: int) -> None:
        """Set the number of workers beside this process (None fills the cluster), and their GPUs and CPU cores."""
        self._workers, self._needs = workers, {"num_gpus": gpus, "num_cpus": cpus}

    def _connect(self) -> None:
        if self._node:
            return
        cpus = self._needs["num_cpus"] * (self._workers or 1)
        self._resources.enter_context(_connected(self._address, cpus))
        context = ray_module().get_runtime_context()
        host, _, port = context.gcs_address.rpartition(":")
        self._gcs, self._last_seen, self._node = (host, int(port)), time.monotonic(), context.get_node_id()

    def open(self, evaluation: Evaluation) -> None:
        """Connect to or start the cluster, and upload the evaluation. Raises UsageError or MachineError."""
        self._connect()
        self._evaluation = self.put((evaluation, version("abliteration-job")))

    def capacity(self) -> int:
        """Return how many workers may run now, connected. Raises UsageError, or MachineError if the cluster is gone."""
        self._connect()
        self.require_cluster()
        if self._workers is not None:
            return self._workers
        alive = [node["Resources"] for node in ray_module().nodes() if node["Alive"]]
        return max(0, sum(map(self._room, alive)) - 1)  # one of them is this process

    def _room(self, node: dict[str, float]) -> int:
        needed = {"GPU": self._needs["num_gpus"], "CPU": self._needs["num_cpus"]}
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

    @contextmanager
    def worker(self, number: int) -> Iterator[Worker]:
        """Yield an actor with a loaded model, once the cluster has room. Raises WorkerLost if it ends first.

        An actor on this process's own device stays idle, to keep the device from other actors.
        """
        options = {"max_restarts": 0, "max_task_retries": 0, "scheduling_strategy": "SPREAD", **self._needs}
        with ExitStack() as actors:
            while True:
                while not self.answers():  # calls to a dead cluster block until Ray ends this process
                    self.require_wanted()
                    time.sleep(_LOOK_SECONDS)
                actor = ray_module().remote(**options)(_Actor).remote()
                worker = actors.enter_context(self._kept(RayWorker(self, actor)))
                if not self._is_own(*worker.ask("place", None)):
                    break
            worker.hardware = worker.ask("begin", self._evaluation)
            yield worker

    def _is_own(self, node: str, gpus: frozenset[str]) -> bool:
        """Return whether a node and GPUs are those that this process uses."""
        count = self._needs["num_gpus"]
        return node == self._node and (bool(gpus & visible_gpus(count)) if count else self._workers is None)

    def require_wanted(self) -> None:
        """Raise WorkerLost if it is pointless to wait for a worker."""
        super().require_wanted()
        try:
            self.require_cluster()
        except MachineError as error:
            raise WorkerLost(str(error)) from error

    def require_cluster(self) -> None:
        """Raise MachineError if the cluster has been gone for a while."""
        if self.answers():
            self._last_seen = time.monotonic()
        elif time.monotonic() - self._last_seen > GONE_SECONDS:
            raise MachineError(f"the Ray cluster at {self._gcs[0]}:{self._gcs[1]} is gone", remedy=_AGAIN)

    def answers(self) -> bool:
        """Return whether the cluster's head can be reached."""
        try:
            with socket.create_connection(self._gcs, timeout=_LOOK_SECONDS):
                return True
        except OSError:
            return False


class RayWorker(Worker):
    """An actor of a Ray cluster."""

    def __init__(self, engine: RayEngine, actor: Any) -> None:
        super().__init__()
        self._engine = engine
        self._actor = actor

    def ask(self, method: str, value: Any, limit: float | None = None) -> Any:
        """Return its answer. Raises WorkerOutOfMemory; WorkerLost on death, after `limit` seconds, or once unneeded."""
        ray, begun = ray_module(), time.monotonic()
        try:
            answer = self._actor.answer.remote(method, value)
            while not ray.wait([answer], timeout=_LOOK_SECONDS)[0]:
                self._engine.require_wanted()
                if limit is not None and time.monotonic() - begun > limit:
                    raise hung(limit)
            return result_of(ray.get(answer))
        except ray.exceptions.RayError as error:
            raise WorkerLost(f"is lost: {_last_line(error)}") from error

    def end(self) -> None:
        """Kill it, unless it is dead or the cluster is: then the call would block, and no actor survives."""
        if not self._engine.answers():
            return
        ray = ray_module()
        try:
            ray.kill(self._actor)
        except (ray.exceptions.RayError, ValueError):
            return  # it is dead


class _Actor:
    """The inside of an actor."""

    def __init__(self) -> None:
        self._resources = ExitStack()
        self._resources.enter_context(guarded_output())  # Ray keeps printed output in files
        self._host = Host(self._resources)

    def answer(self, method: str, value: Any) -> Any:
        if method == "place":
            return ray_module().get_runtime_context().get_node_id(), visible_gpus()
        if method == "begin":
            value, wanted = value
            if wanted != (own := version("abliteration-job")):
                return WorkerLost(f"has failed: abliteration-job {own} is installed there, but {wanted} here")
        return self._host.answer(method, value)


def cluster_address(given: str | None) -> str | None:
    """Return a cluster's address, or None to start one. Must run before Ray is imported: it sets Ray's variables.

    A new cluster is restricted to the loopback interface: otherwise Ray's processes listen on all interfaces, whatever
    the node's address. A given one has a minute or two to accept this process: by default Ray tries for 14 minutes.
    """
    address = given or os.environ.get("RAY_ADDRESS")
    if address is None:
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    else:
        os.environ.setdefault("RAY_NUM_REDIS_GET_RETRIES", "2")
    return address


def ray_module() -> Any:
    """Import Ray with tokens, without telemetry or automatic connection. Raises UsageError if missing."""
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    os.environ.update(RAY_USAGE_STATS_ENABLED="0", RAY_ENABLE_AUTO_CONNECT="0")
    require_extra("ray", "engine = ray")
    import ray

    return ray


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
