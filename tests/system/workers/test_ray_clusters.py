"""Whole jobs on Ray clusters that are given: an actor hangs, the cluster dies and another takes its place."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.fakes.ray_cluster import RayCluster
from tests.helpers import (
    STARTED,
    abliterate,
    count_events,
    environment,
    job_arguments,
    manifest,
    slowed_until,
    start,
    stored_trials,
    wait_until,
)

pytestmark = [pytest.mark.full("workers"), pytest.mark.slow, pytest.mark.xdist_group("ray")]

BATCHES = ("trials_per_batch=6", "batching.trials=2", "startup_trials=12", "search.ahead=0")
LAYOUT = (*(word for setting in BATCHES for word in ("--set", setting)), "--trials")
# The command, except that a task hangs after 20 times the slowest so far, however short: usually after 120 s at least.
MEASURED_LIMIT = """
from functools import partial
from job.stages import workers
workers.Executor = partial(workers.Executor, hang_seconds=0.0)
from job.cli.main import main
main()
"""


def cluster_of_all_cores(port: int | None = None) -> RayCluster:
    """Return a cluster with room for an actor, which gets its share of this machine's cores."""
    return RayCluster(port, **{"num-cpus": os.cpu_count() or 1})


def by_ray(cluster: RayCluster) -> tuple[str, ...]:
    return ("--engine", "ray", "--address", cluster.address, "--workers", "2")


def assert_like(workspace: Path, other: Path) -> None:
    assert stored_trials(workspace) == stored_trials(other)
    assert manifest(workspace) == manifest(other)


def test_a_job_replaces_an_actor_that_hangs_and_makes_the_trials_of_one_process(organism: Path, tmp_path: Path) -> None:
    workspace, job = tmp_path / "runs", ("run", *job_arguments(organism), *LAYOUT)
    with cluster_of_all_cores() as cluster:
        words = [*job, "100000", "--workspace", str(workspace), *by_ray(cluster)]
        env = environment(**cluster.env)
        process = subprocess.Popen(
            [sys.executable, "-c", MEASURED_LIMIT, *words], env=env, stderr=subprocess.PIPE, text=True
        )
        STARTED.append(process)
        wait_until(lambda: count_events(workspace, "worker_started") >= 1, process)
        ready = count_events(workspace)
        wait_until(lambda: count_events(workspace) >= ready + 30, process)  # the actor has finished some trials
        (actor,) = cluster.actors()
        started, lost = (count_events(workspace, event) for event in ("worker_started", "worker_lost"))
        stopped = time.monotonic()
        actor.send_signal(signal.SIGSTOP)
        wait_until(lambda: count_events(workspace, "worker_lost") > lost, process, seconds=100)
        assert time.monotonic() - stopped < 100
        assert psutil.wait_procs([actor], timeout=20)[1] == []
        wait_until(lambda: count_events(workspace, "worker_started") > started, process)
        ready = count_events(workspace)
        wait_until(lambda: count_events(workspace) >= ready + 12, process)
        process.send_signal(signal.SIGTERM)
        err = process.communicate(timeout=60)[1]
        assert process.returncode == 75, err
    assert re.search(r"worker 1 has hung: no result after [1-9]\d? s; a new worker replaces it", err), err
    trials = str(count_events(workspace) + 6)
    for place in (workspace, tmp_path / "alone"):
        abliterate(*job, trials, "--workspace", place).check()
    assert_like(workspace, tmp_path / "alone")


def test_a_job_whose_cluster_dies_continues_on_a_new_one_by_the_same_command(organism: Path, tmp_path: Path) -> None:
    workspace, job = tmp_path / "runs", ("run", *job_arguments(organism), *LAYOUT, "150", "--workspace")
    with cluster_of_all_cores() as cluster:
        command = (*job, workspace, *by_ray(cluster))
        process = start(*command, **cluster.env)
        wait_until(lambda: count_events(workspace, "search_started") == 1, process)
        slowed_until(lambda: count_events(workspace, "worker_started") == 1, process)
        before = count_events(workspace)
        slowed_until(lambda: count_events(workspace) > before, process)
        cluster.kill(0)
        slowed_until(lambda: False, process, seconds=60)
        err = process.communicate(timeout=60)[1]
        assert process.returncode == 76, err
        assert f":{cluster.port} is gone" in err
        assert "run again to continue: on a new cluster" in err
        assert "Traceback" not in err
    assert before < count_events(workspace) < 150
    with cluster_of_all_cores(cluster.port) as new:
        process = start(*command, **new.env)
        wait_until(lambda: count_events(workspace, "search_started") == 2, process)
        slowed_until(lambda: count_events(workspace, "worker_started") == 2, process)
        err = process.communicate(timeout=240)[1]
        assert process.returncode == 0, err
    assert count_events(workspace, "worker_started") == 2
    abliterate(*job, tmp_path / "alone").check()
    assert_like(workspace, tmp_path / "alone")
