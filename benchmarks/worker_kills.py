"""Kill workers, a cluster's node and the run with SIGKILL: does the job end as with one uninterrupted process?

python -m benchmarks.worker_kills [ORGANISM] [--engines local ray] [--kills 20] [--workers 3] [--seed 0]

A job continues through all kills. It is restarted when the run, or the cluster that it started, is killed. When it has
finished it is compared with an uninterrupted job in one process. ORGANISM is a folder made by `abliterate demo-model`;
made if absent. Exits with 1 on any difference.
"""

from __future__ import annotations

import argparse
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import psutil

from job.organism.folder import write_organism
from tests.helpers import COMMAND, abliterate, count_events, environment, job_arguments, wait_until, worker_processes
from tests.system.workers.test_workers import ENDLESS, LAYOUT, is_like, ray_workers

VICTIMS = {"local": ("worker", "run"), "ray": ("worker", "node", "run")}


class KilledJob:
    """A job whose processes are killed.

    Attributes:
        ends: Exit codes of its starts.
    """

    def __init__(self, organism: Path, workspace: Path, engine: str, workers: int) -> None:
        self._engine = engine
        self._workspace = workspace
        words = ("run", *job_arguments(organism), "--workspace", workspace, "--engine", engine, "--workers", workers)
        self._words = [*map(str, words), *LAYOUT]
        self._process: subprocess.Popen[str] | None = None
        self.ends: Counter[int] = Counter()

    def kill(self, victim: str, pause: float) -> None:
        """Kill one of its processes after a pause, and check that no worker outlives the run.

        Raises:
            AssertionError: The job ended, or a worker outlived the run.
        """
        process = self._process = self._process or self._started()
        began = count_events(self._workspace, "worker_started")
        if victim != "run":  # the run is killed at any time, also during startup
            wait_until(lambda: self._workers() != [], process)
        time.sleep(pause)
        workers = self._workers()
        chosen = {"run": [psutil.Process(process.pid)], "worker": workers, "node": self._nodes()}[victim]
        if not chosen:
            return
        chosen[0].kill()
        if victim == "worker":
            wait_until(lambda: count_events(self._workspace, "worker_started") > began or process.poll() is not None)
            assert process.poll() is None, process.communicate()[1][-2000:]
            return
        err = process.communicate(timeout=120)[1]
        self.ends[process.returncode] += 1
        assert process.returncode in (-signal.SIGKILL, 1, 76), err[-2000:]
        assert psutil.wait_procs(workers, timeout=60)[1] == []
        self._process = None

    def finish(self, trials: int) -> None:
        """Stop it, then run it to its end.

        Raises:
            AssertionError: It cannot be finished.
        """
        if self._process is not None:
            self._process.send_signal(signal.SIGTERM)
            self._process.communicate(timeout=120)
        abliterate(*self._words, trials, process=True).check()

    def _started(self) -> subprocess.Popen[str]:
        words = [*COMMAND, *self._words, str(ENDLESS)]
        return subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment())

    def _workers(self) -> list[psutil.Process]:
        assert self._process is not None
        of = ray_workers if self._engine == "ray" else worker_processes
        return of(self._process.pid)

    def _nodes(self) -> list[psutil.Process]:
        assert self._process is not None
        children = psutil.Process(self._process.pid).children(recursive=True)
        return [child for child in children if child.name() == "raylet"]


def main() -> int:
    """Kill, compare and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("organism", nargs="?", type=Path)
    parser.add_argument("--engines", nargs="+", choices=VICTIMS, default=list(VICTIMS))
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    organism = given.organism or Path(tempfile.mkdtemp()) / "organism"
    if not organism.exists():
        write_organism(organism, arch="llama", size="tiny", seed=0, report=print)
    differ = 0
    for engine in given.engines:
        draw, folder = random.Random(given.seed), Path(tempfile.mkdtemp())
        job, fallen = KilledJob(organism, folder / "runs", engine, given.workers), Counter[str]()
        for number in range(given.kills):
            victim = draw.choice(VICTIMS[engine])
            job.kill(victim, draw.uniform(0, 20 if victim == "run" else 5))
            fallen[victim] += 1
            print(f"{engine}: kill {number + 1}, a {victim}; {count_events(folder / 'runs')} trials", flush=True)
        trials = count_events(folder / "runs") + 12
        job.finish(trials)
        abliterate("run", *job_arguments(organism), *LAYOUT, trials, "--workspace", folder / "alone").check()
        same = is_like(folder / "runs", folder / "alone")
        differ += not same
        print(
            f"{engine}: {dict(fallen)}, exit codes {dict(job.ends)}, {trials} trials: {'same' if same else 'DIFFERENT'}"
        )
    return 1 if differ else 0


if __name__ == "__main__":
    sys.exit(main())
