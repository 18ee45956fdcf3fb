"""Trials per second with one worker and with several, for each engine, and an engine's overhead per task.

python -m benchmarks.workers [ORGANISM] [--workers 1 2] [--rounds 3] [--seconds 20] [--json FILE]
python -m benchmarks.workers [ORGANISM] --start [--workers 1 2] [--rounds 5]

Each process computes with one thread. A search is timed from its second batch after all workers are ready. The
configurations take turns. After that, each runs a job to its end, and the trials and exports are compared: exits with 1
on any difference. `--start` measures only when a job's first batch of 8 trials is known, with local workers, by the
times in its events. ORGANISM is a folder made by `abliterate demo-model`; made if absent.
"""

from __future__ import annotations

import argparse
import json
import signal
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.measuring import machine, write_figures
from job.organism.folder import write_organism
from job.storage.events import Events
from job.workers.executor import Executor
from job.workers.local import LocalEngine
from job.workers.ray_engine import RayEngine
from job.workers.worker import Engine
from tests.fakes.evaluations import Do, Doing
from tests.helpers import abliterate, events, job_arguments, start, wait_until
from tests.system.workers.test_workers import is_like

# The same search for any number of workers. No search reaches this number of trials.
LAYOUT = ("trials_per_batch=8", "batching.trials=2", "startup_trials=16", "search.ahead=0")
ENDLESS, WHOLE = 100_000, 24
TASKS = 500


@dataclass(frozen=True)
class Setup:
    """How a search runs."""

    engine: str
    workers: int

    def __str__(self) -> str:
        return f"{self.engine}, {self.workers} worker{'s' * (self.workers > 1)}"


def trials_per_second(organism: Path, setup: Setup, seconds: float) -> float:
    """Return a search's trials per second, measured over `seconds`."""
    with tempfile.TemporaryDirectory() as workspace:
        process = start(*words(organism, workspace, setup, ENDLESS), OMP_NUM_THREADS=str(setup.workers))
        try:
            wait_until(lambda: _told(workspace, "worker_started") == setup.workers - 1, process, seconds=300)
            ready = _told(workspace, "trial")
            wait_until(lambda: _told(workspace, "trial") >= ready + 16, process)
            begin, before = time.monotonic(), _told(workspace, "trial")
            time.sleep(seconds)
            return (_told(workspace, "trial") - before) / (time.monotonic() - begin)  # in whole batches
        finally:
            process.send_signal(signal.SIGTERM)
            process.communicate()


def seconds_to_first_trials(organism: Path, workers: int) -> dict[str, float]:
    """Return when a job's search begins, its first worker is ready and its first trials are known, since its start."""
    with tempfile.TemporaryDirectory() as workspace:
        job = words(organism, workspace, Setup("local", workers), 16)
        abliterate(*job, process=True, cold=True, OMP_NUM_THREADS=str(workers)).check()
        first: dict[str, float] = {}
        for event in events(Path(workspace)):
            first.setdefault(event["event"], event["time"])
        times = {name: first.get(name, float("nan")) for name in ("search_started", "worker_started", "trial")}
        return {name: time - first["job_started"] for name, time in times.items()}


def measure_starts(organism: Path, workers: Sequence[int], rounds: int) -> None:
    """Print the seconds to the first trials for each number of workers, in turn."""
    found: dict[int, list[float]] = defaultdict(list)
    for _ in range(rounds):
        for count in workers:
            times = seconds_to_first_trials(organism, count)
            found[count].append(times["trial"])
            print(f"{count} workers:", ", ".join(f"{name} {time:.2f} s" for name, time in times.items()), flush=True)
    for count, seconds in found.items():
        print(f"{count} workers: {statistics.median(seconds):.2f} s ({min(seconds):.2f} to {max(seconds):.2f})")


def words(organism: Path, workspace: str | Path, setup: Setup, trials: int) -> list[str]:
    """Return the command line of a job."""
    options = [word for setting in LAYOUT for word in ("--set", setting)]
    engine = ("--engine", setup.engine, "--workers", setup.workers)
    job = ("run", *job_arguments(organism), "--workspace", workspace, "--trials", trials)
    return [*map(str, (*job, *options, *engine))]


def are_equal(organism: Path, setups: Sequence[Setup]) -> bool:
    """Return whether a job has the same trials and export in each way, and print it."""
    folders = [Path(tempfile.mkdtemp()) for _ in setups]
    for setup, folder in zip(setups, folders, strict=True):
        abliterate(*words(organism, folder, setup, WHOLE), process=True).check()
    same = [is_like(folder, folders[0]) for folder in folders]
    for setup, equal in zip(setups, same, strict=True):
        print(f"{setup}: trials and export are {'equal' if equal else 'DIFFERENT'}", flush=True)
    return all(same)


def _told(workspace: str, event: str) -> int:
    return sum(path.read_text().count(f'"event": "{event}"') for path in Path(workspace).glob("*/events.jsonl"))


def milliseconds_per_task(engine: Engine) -> float:
    """Return the time for one worker to evaluate an empty task."""
    with Executor(engine, Events(stream=sys.stderr)) as executor:
        executor.open(Doing(), "abacus")
        with engine.worker(2) as worker:
            worker.ask("evaluate", Do("square", 1))
            begin = time.monotonic()
            for number in range(TASKS):
                worker.ask("evaluate", Do("square", number))
            return 1000 * (time.monotonic() - begin) / TASKS


def engines() -> Iterator[tuple[str, Engine]]:
    """Yield each engine with room for one worker."""
    local = LocalEngine(_nothing, 0)
    local.use(1, [])
    yield "local", local
    ray = RayEngine(None)
    ray.use(1, gpus=0, cpus=1)
    yield "ray", ray


def _nothing() -> None: ...


def main() -> int:
    """Measure, compare and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("organism", nargs="?", type=Path)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--start", action="store_true", help="measure only the start of a job")
    given = parser.parse_args()
    organism = given.organism or Path(tempfile.mkdtemp()) / "organism"
    if not organism.exists():
        write_organism(organism, arch="llama", size="tiny", seed=0, report=print)
    if given.start:
        measure_starts(organism, given.workers, given.rounds)
        return 0
    setups = [Setup(engine, workers) for engine in ("local", "ray") for workers in given.workers]
    rates: dict[str, list[float]] = defaultdict(list)
    for _ in range(given.rounds):
        for setup in setups:
            rates[str(setup)].append(trials_per_second(organism, setup, given.seconds))
            print(f"{setup}: {rates[str(setup)][-1]:.2f} trials/s", flush=True)
    first = rates[str(setups[0])]
    for name, found in rates.items():
        gains = [rate / other for rate, other in zip(found, first, strict=True)]
        print(f"{name}: {statistics.median(found):.2f} trials/s, {statistics.median(gains):.2f} times the first", gains)
    overhead = {name: milliseconds_per_task(engine) for name, engine in engines()}
    print(f"milliseconds a task: {json.dumps(overhead)}")
    if given.json:
        write_figures(
            given.json,
            {"machine": machine(torch.device("cpu")), "trials_per_second": rates, "milliseconds_per_task": overhead},
        )
    return 0 if are_equal(organism, setups) else 1


if __name__ == "__main__":
    sys.exit(main())
