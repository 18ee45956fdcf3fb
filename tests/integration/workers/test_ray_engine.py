"""Workers on a real Ray cluster on the loopback interface."""

from __future__ import annotations

import itertools
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from job.errors import MachineError, UsageError
from job.preflight.rental_checks import cluster_check
from job.storage.events import Events
from job.workers import ray_engine
from job.workers.executor import HANG_SECONDS, Executor
from job.workers.ray_engine import RayEngine
from job.workers.worker import WorkerLost, WorkerOutOfMemory
from tests.fakes.evaluations import Do, Doing
from tests.fakes.ray_cluster import TOKEN, RayCluster, family
from tests.helpers import environment, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("ray"), pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayCluster]:
    with RayCluster(**{"num-gpus": 2}) as cluster:
        yield cluster


@pytest.fixture
def engine(cluster: RayCluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[RayEngine]:
    yield from connected(cluster, monkeypatch)


def connected(cluster: RayCluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[RayEngine]:
    for name, value in cluster.env.items():
        monkeypatch.setenv(name, value)
    made = RayEngine(cluster.address)
    made.use(1, gpus=0, cpus=1)
    try:
        yield made
    finally:
        made.end()
        made.close()


NUMBERS = itertools.count()


def fresh(what: str, count: int) -> list[Do]:
    """Return tasks without cached results."""
    return [Do(what, next(NUMBERS)) for _ in range(count)]


def squares_for(executor: Executor, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        squares(executor, 10)


def own_pid(task: Do) -> int:
    time.sleep(0.02)
    return os.getpid()


def squares(executor: Executor, count: int = 30) -> None:
    tasks = fresh("square", count)

    def here(task: Do) -> int:
        time.sleep(0.02)
        return task.number**2

    assert executor.evaluate(tasks, here) == [task.number**2 for task in tasks]


def test_a_worker_evaluates_shares_and_says_that_memory_does_not_suffice(engine: RayEngine) -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    engine.open(Doing())
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    with engine.worker(1) as worker:
        assert worker.hardware == "abacus"
        assert worker.ask("evaluate", Do("square", 7), 60) == 49
        worker.ask("share", engine.put({"basis": [1, 2]}))
        assert worker.ask("evaluate", Do("shared"), 60) == {"basis": [1, 2]}
        with pytest.raises(WorkerOutOfMemory, match="2 GiB"):
            worker.ask("evaluate", Do("memory"), 60)
        assert worker.ask("evaluate", Do("square", 3), 60) == 9
        with pytest.raises(WorkerLost, match="has failed: the model's files have changed"):
            worker.ask("evaluate", Do("error"), 60)
        with pytest.raises(WorkerLost, match="has hung: no result after 1 s"):
            worker.ask("evaluate", Do("hang"), 0.6)


def test_an_actor_that_is_killed_is_replaced(engine: RayEngine, cluster: RayCluster) -> None:
    with Executor(engine, Events()) as executor:
        executor.open(Doing(), "abacus")
        wait_until(lambda: len(cluster.actors()) == 1)
        squares(executor)
        (actor,) = cluster.actors()
        actor.kill()
        squares(executor)
        wait_until(lambda: [one.pid for one in cluster.actors()] not in ([], [actor.pid]))
        squares(executor)


def test_an_actor_that_is_stopped_is_replaced_after_a_measured_time(
    engine: RayEngine, cluster: RayCluster, capsys: pytest.CaptureFixture[str]
) -> None:
    def here(task: Do) -> int:
        time.sleep(0.1)  # a hundred times an actor's time: one that is well is not given up
        return os.getpid()

    with Executor(engine, Events(), hang_seconds=0.0) as executor:
        executor.open(Doing(), "abacus")
        actor = None
        deadline = time.monotonic() + 60
        while actor is None and time.monotonic() < deadline:
            seen = set(executor.evaluate(fresh("pid", 4), here)) - {os.getpid()}
            actor = psutil.Process(seen.pop()) if seen else None
        assert actor is not None
        actor.send_signal(signal.SIGSTOP)
        stopped = time.monotonic()
        # The stopped actor gets one of the tasks: nothing says that it will not answer.
        assert actor.pid not in executor.evaluate(fresh("pid", 4), here)
        assert 20 * 0.1 <= time.monotonic() - stopped < HANG_SECONDS / 2
        assert psutil.wait_procs([actor], timeout=20)[1] == []
        wait_until(lambda: [one.pid for one in cluster.actors()] not in ([], [actor.pid]))
        squares(executor)
    lost = re.findall(r"worker 1 has hung: no result after (\d+) s", capsys.readouterr().err)
    assert lost
    assert all(2 <= int(seconds) < HANG_SECONDS / 2 for seconds in lost)


@pytest.mark.full("workers")
def test_a_machine_joins_is_used_and_is_taken_away(engine: RayEngine, cluster: RayCluster) -> None:
    engine.use(None, gpus=0, cpus=2)  # one whole node each; this process occupies one
    with Executor(engine, Events()) as executor:
        executor.open(Doing(), "abacus")
        squares(executor)
        assert engine.capacity() == 0
        node = cluster.add()
        wait_until(lambda: engine.capacity() == 1)
        there = {os.getpid()}
        deadline = time.monotonic() + 60
        while there == {os.getpid()} and time.monotonic() < deadline:
            there |= set(executor.evaluate(fresh("pid", 20), own_pid))
        # This process' node gets none: only the new one does.
        assert there - {os.getpid()} <= {process.pid for process in family(cluster.nodes[node].pid)}
        assert len(there) == 2
        cluster.kill(node)
        squares(executor)
        wait_until(lambda: engine.capacity() == 0)
        squares(executor)


def test_the_gpu_of_this_process_is_given_to_no_worker(engine: RayEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    engine.use(None, gpus=1, cpus=1)
    assert engine.capacity() == 1  # known before there is an evaluation, which the number of workers decides about
    engine.open(Doing())
    with engine.worker(1) as worker:
        assert worker.ask("evaluate", Do("environment"), 60)["CUDA_VISIBLE_DEVICES"] == "1"


@pytest.mark.full("workers")
def test_a_head_that_is_killed_ends_the_search_and_not_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_engine, "GONE_SECONDS", 2.0)
    with RayCluster() as cluster:
        for engine in connected(cluster, monkeypatch):
            with Executor(engine, Events()) as executor:
                executor.open(Doing(), "abacus")
                wait_until(lambda: len(cluster.actors()) == 1)
                cluster.kill(0)
                with pytest.raises(MachineError, match="is gone"):
                    squares_for(executor, 20)  # this process continues while the outcome is uncertain


@pytest.mark.full("workers")
def test_no_room_for_the_jobs_data_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    full = {
        "object-store-memory": 80_000_000,
        "system-config": '{"automatic_object_spilling_enabled": false, "local_fs_capacity_threshold": 0.0}',
    }
    with RayCluster(**full) as cluster:
        for engine in connected(cluster, monkeypatch):
            with pytest.raises(MachineError, match="no memory left for the job's data"):
                engine.open(Doing(ballast=os.urandom(200_000_000)))


@pytest.mark.full("workers")
def test_a_stranger_without_the_token_is_not_let_in(cluster: RayCluster) -> None:
    script = (
        "from job.workers.ray_engine import RayEngine; from tests.fakes.evaluations import Doing\n"
        f"engine = RayEngine({cluster.address!r}); engine.use(1, gpus=0, cpus=1); engine.open(Doing())"
    )
    env = {**os.environ, **cluster.env, "RAY_AUTH_TOKEN": "0" * 64}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True)
    assert done.returncode == 1
    assert "MachineError: a Ray cluster at" in done.stderr
    assert "0" * 64 not in done.stderr


@pytest.mark.full("workers")
def test_a_server_that_is_no_cluster_is_one_line_after_two_minutes() -> None:
    """What answers at the address may be a tunnel, another service, or a cluster that only its own machine reaches."""
    with socket.create_server(("0.0.0.0", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        assert address in cluster_check(address).measured
        script = (
            "from job.workers.ray_engine import RayEngine\n"
            f"engine = RayEngine({address!r}); engine.use(1, gpus=0, cpus=1); engine.capacity()"
        )
        command = [sys.executable, "-c", script]
        env = environment(RAY_AUTH_TOKEN=TOKEN)
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=150)
    assert f"MachineError: a Ray cluster at {address} cannot be reached: Failed to connect" in done.stderr


@pytest.mark.full("workers")
def test_a_cluster_of_this_machine_alone_is_started_listens_on_loopback_and_ends_with_the_run() -> None:
    script = (
        "import sys; from job.workers.ray_engine import RayEngine; from tests.fakes.evaluations import Do, Doing\n"
        "engine = RayEngine(None); engine.use(1, gpus=0, cpus=1); engine.open(Doing())\n"
        "with engine.worker(1) as worker:\n"
        "    print(worker.ask('evaluate', Do('square', 5), 60), flush=True); sys.stdin.read()"
    )
    env = {name: value for name, value in environment().items() if not name.startswith("RAY_")}
    command = [sys.executable, "-c", script]
    run = subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=Path.cwd())
    assert run.stdout is not None
    assert run.stdout.readline() == b"25\n"
    started = family(run.pid)
    listening = {
        connection.laddr.ip.removeprefix("::ffff:")
        for process in started
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    }
    assert listening == {"127.0.0.1"}
    names = {process.pid: " ".join(process.cmdline()).strip() for process in started}
    run.kill()
    run.communicate()
    # Ray's helper processes that hold nothing take longer to notice.
    left = psutil.wait_procs([one for one in started if not names[one.pid].endswith("Agent")], timeout=30)[1]
    assert left == []


def test_an_address_that_is_none_or_where_nothing_answers_is_told_before_anything_runs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(UsageError, match="not the address of a Ray cluster"):
        cluster_check("nowhere")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        with pytest.raises(MachineError, match="no Ray cluster answers"):
            cluster_check(f"127.0.0.1:{free.getsockname()[1]}")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert "to be started on this machine" in cluster_check(None).measured
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UsageError, match="needs ray, which is not installed"):
        cluster_check(None)


def test_threads_end_when_the_executor_does(engine: RayEngine) -> None:
    engine.use(3, gpus=2, cpus=1)  # two of them wait for room
    with Executor(engine, Events()) as executor:
        executor.open(Doing(), "abacus")
        squares(executor, 2)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("worker-")]
