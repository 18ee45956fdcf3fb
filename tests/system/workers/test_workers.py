"""Jobs with workers: the result equals that of one process, whichever engine and whichever worker dies."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from job.stages.model import cpu_threads, share_of_threads
from tests.helpers import (
    abliterate,
    count_events,
    environment,
    job_arguments,
    manifest,
    only_job,
    start,
    stored_trials,
    wait_until,
)
from tests.helpers import worker_processes as local_workers
from tests.processes import USUAL
from tests.warm import Warm, server_at

# Six trials per batch, two sharing their forwards; the search depends neither on the number of trials nor on that of
# workers at the first start.
BATCHES = ("trials_per_batch=6", "batching.trials=2", "startup_trials=12", "search.ahead=0")
LAYOUT = (*(word for setting in BATCHES for word in ("--set", setting)), "--trials")
# More trials than finish before the workers are ready, however long a cluster takes; such a job is stopped.
ENDLESS = 100_000


def ray_workers(run: int) -> list[psutil.Process]:
    """Return the actors of the cluster that a run has started."""
    return [child for child in psutil.Process(run).children(recursive=True) if _name(child).startswith("ray::_Actor")]


def _name(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


ENGINES = [
    pytest.param("local", local_workers, id="local"),
    # Starting a cluster takes as long as the rest of such a job.
    pytest.param("ray", ray_workers, id="ray", marks=pytest.mark.full("workers")),
]


def begun(*job: Any, engine: str) -> subprocess.Popen[str]:
    """Start a job, paused while local workers import their libraries: meanwhile it would make a hundred trials."""
    process = start(*job, "--engine", engine, loaded=True)
    if engine != "local":
        return process
    wait_until(lambda: bool(local_workers(process.pid)), process)
    process.send_signal(signal.SIGSTOP)
    idle = 0
    deadline = time.monotonic() + 120
    while idle < 20 and time.monotonic() < deadline:
        asleep = all(one.status() == psutil.STATUS_SLEEPING for one in local_workers(process.pid))
        idle = idle + 1 if asleep else 0
        time.sleep(0.02)
    process.send_signal(signal.SIGCONT)
    return process


def is_like(workspace: Path, other: Path) -> bool:
    return stored_trials(workspace) == stored_trials(other) and manifest(workspace) == manifest(other)


@pytest.mark.slow
@pytest.mark.xdist_group("workers")
@pytest.mark.parametrize(("engine", "workers_of"), ENGINES)
def test_workers_make_the_trials_of_one_process_also_when_one_the_run_or_all_are_killed(
    organism: Path, tmp_path: Path, engine: str, workers_of: Callable[[int], list[psutil.Process]]
) -> None:
    workspace, job = tmp_path / "runs", ("run", *job_arguments(organism), *LAYOUT)
    endless = (*job, ENDLESS, "--workspace", workspace)
    # One worker dies; then the run dies, which the other one does not outlive.
    process = begun(*endless, "--workers", 3, engine=engine)
    wait_until(lambda: count_events(workspace, "worker_started") >= 1, process)
    workers = workers_of(process.pid)
    assert len(workers) == 2  # one of them may still have to load the model
    workers[0].kill()
    wait_until(lambda: count_events(workspace, "worker_lost") == 1, process)
    wait_until(lambda: count_events(workspace, "worker_started") >= 2, process)
    workers = workers_of(process.pid)
    process.kill()
    process.communicate()
    assert psutil.wait_procs(workers, timeout=20)[1] == []
    # The next run is asked to stop, which ends its worker, and the last one goes on alone.
    before = count_events(workspace, "worker_started")
    process = begun(*endless, "--workers", 2, engine=engine)
    wait_until(lambda: count_events(workspace, "worker_started") > before, process)
    workers, asked = workers_of(process.pid), time.monotonic()
    assert len(workers) == 1
    process.send_signal(signal.SIGTERM)
    err = process.communicate(timeout=60)[1]
    assert time.monotonic() - asked < 10
    assert process.returncode == 75, err
    assert "Traceback" not in err
    assert psutil.wait_procs(workers, timeout=10)[1] == []
    trials = count_events(workspace) + 12  # two more batches
    abliterate(*job, trials, "--workspace", workspace).check()
    abliterate(*job, trials, "--workspace", tmp_path / "alone").check()
    assert is_like(workspace, tmp_path / "alone")


@pytest.mark.full("workers")
@pytest.mark.slow
@pytest.mark.xdist_group("workers")
@pytest.mark.parametrize("engine", ["local", "ray"])
def test_an_interrupted_run_is_finished_by_workers(organism: Path, tmp_path: Path, engine: str) -> None:
    job = ("run", *job_arguments(organism), *LAYOUT)
    process = start(*job, ENDLESS, "--workspace", tmp_path / "runs")
    wait_until(lambda: count_events(tmp_path / "runs") >= 6, process)
    process.kill()
    process.communicate()
    job = (*job, count_events(tmp_path / "runs") + 12)
    # Not here, where Ray may have been used with another cluster: it reads a token once per process.
    how = ("--engine", engine, "--workers", 3)
    abliterate(*job, "--workspace", tmp_path / "runs", *how, process=True).check()
    abliterate(*job, "--workspace", tmp_path / "alone").check()
    assert is_like(tmp_path / "runs", tmp_path / "alone")


@pytest.mark.full("workers")
@pytest.mark.slow
@pytest.mark.xdist_group("workers")
def test_what_is_asked_ahead_is_the_same_with_workers_and_after_a_kill(organism: Path, tmp_path: Path) -> None:
    job = ["run", *job_arguments(organism), *LAYOUT, 24, "--set", "search.ahead=1", "--workspace"]
    abliterate(*job, tmp_path / "alone").check()
    process = start(*job, tmp_path / "runs", "--workers", 2)
    wait_until(lambda: count_events(tmp_path / "runs") >= 6, process)
    process.kill()
    process.communicate()
    abliterate(*job, tmp_path / "runs", "--workers", 3).check()
    assert is_like(tmp_path / "runs", tmp_path / "alone")


@pytest.mark.full("workers")
@pytest.mark.xdist_group("workers")
# In both lanes stages/test_objectives.py continues a job with workers.
@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1)])
def test_a_job_continues_with_another_number_of_workers_as_it_began(
    organism: Path, tmp_path: Path, before: int, after: int
) -> None:
    """The number of workers decides the batches of the first start, and nothing afterwards, not even the job's name."""
    job = ("run", *job_arguments(organism), "--startup-trials", 8, "--workspace")
    asked = ("--set", "trials_per_batch=4")  # the former default, which names the same job
    process = start(*job, tmp_path / "moved", "--workers", before, "--trials", ENDLESS)
    wait_until(lambda: count_events(tmp_path / "moved") >= 8, process)
    process.kill()
    process.communicate()
    trials = count_events(tmp_path / "moved") + 12
    result = abliterate(*job, tmp_path / "moved", "--workers", after, "--trials", trials, *asked).check()
    abliterate(*job, tmp_path / "alone", "--workers", before, "--trials", trials).check()
    assert is_like(tmp_path / "moved", tmp_path / "alone")
    record = json.loads((only_job(tmp_path / "moved") / "job.json").read_text())
    batch, ahead = 4 * before, int(before > 1)
    pinned = {"together": 4, "batch": batch, "ahead": ahead}
    assert {name: record["resolution"][name] for name in pinned} == pinned
    assert record["identity"]["trials_per_batch"] == 4
    assert ("trials_per_batch stays 8, as at the first start, instead of 4" in result.err) == (batch == 8)


@pytest.mark.slow
@pytest.mark.xdist_group("workers")
def test_a_worker_loads_the_models_code_before_it_has_work_and_leaves_what_is_no_model_to_preflight(
    organism: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    script = (
        "import sys; from pathlib import Path; from job.stages.evaluation import warm_up\n"
        "for folder in sys.argv[1:]:\n"
        "    warm_up(Path(folder))\n"
        "    print('transformers.models.llama.modeling_llama' in sys.modules)"
    )
    server = server_at(environment(), USUAL)  # with torch loaded, but none of transformers' models
    request.addfinalizer(server.close)
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    words, env = [str(tmp_path), str(organism / "model")], environment()
    process = Warm(server, words, script=script, text=True, env=env, **streams)
    out, err = process.communicate()
    assert (process.returncode, out.split(), err) == (0, ["False", "True"], "")


def test_what_a_worker_imports_first_loads_no_torch() -> None:
    """The device selection must be set before torch loads."""
    script = "import sys, job.stages.evaluation, job.workers.local; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], env=environment()).returncode == 0


def test_processes_on_a_cpu_share_its_cores() -> None:
    threads = torch.get_num_threads()
    on_cpu, on_gpu = torch.device("cpu"), torch.device("cuda")
    try:
        torch.set_num_threads(6)
        for device, processes, expected in (
            (on_cpu, 1, 6),
            (on_cpu, 4, 1),
            (on_cpu, 3, 2),
            (on_cpu, 8, 1),
            (on_gpu, 3, 6),
        ):
            with cpu_threads(device, share_of_threads(processes)):
                assert torch.get_num_threads() == expected
            assert torch.get_num_threads() == 6
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("words", [["worker", "--checkpoint", "file:///nowhere", "--wait", "1"], ["worker"]])
def test_the_former_command_says_what_took_its_place(words: list[str]) -> None:
    abliterate(*words).fails(2, "was removed", "--engine ray")


def test_the_former_setting_says_what_took_its_place(organism: Path, tmp_path: Path) -> None:
    run = partial(abliterate, "run", *job_arguments(organism), "--workspace", tmp_path)
    run("--set", "database=postgresql+psycopg://me@host/db").fails(2, "unknown setting database", "--engine ray")
