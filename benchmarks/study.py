"""Overhead of the search itself per trial, asking and storing, by number of earlier trials.

python -m benchmarks.study [BATCH]      trials per batch, default 4; scores are random, nothing is evaluated
"""

from __future__ import annotations

import random
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from job.config.load import default_values
from job.records import Plan, TrialScores
from job.search.optimizer import Search, StudySettings
from job.search.space import SearchSpace

TARGETS = (50, 100, 200, 400)


def main() -> None:
    """Print the table."""
    batch = int(sys.argv[1]) if len(sys.argv) > 1 else 4
    drawn = random.Random(0)

    def evaluate(plans: Sequence[Plan]) -> list[TrialScores]:
        count = len(plans[0].parameters)
        return [TrialScores(refusals=drawn.randint(0, 100), kl=drawn.random(), opening=0.0) for _ in range(count)]

    with tempfile.TemporaryDirectory() as folder:
        settings = StudySettings(
            seed=0,
            startup_trials=20,
            batch=batch,
            rows=256,
            ei_candidates=default_values()["search"]["ei_candidates"],
        )
        search = Search(Path(folder) / "study.db", SearchSpace("wide", 32), settings)
        search.run(20, evaluate, told=lambda _: None)
        done = 20
        print(f"{'trials':>12} {'CPU ms':>8} {'wall ms':>8}   a trial")
        for target in TARGETS:
            cpu, wall = time.process_time(), time.perf_counter()
            search.run(target, evaluate, told=lambda _: None)
            took = [1000 * x / (target - done) for x in (time.process_time() - cpu, time.perf_counter() - wall)]
            print(f"{done:>5} - {target:<4} {took[0]:8.1f} {took[1]:8.1f}", flush=True)
            done = target


if __name__ == "__main__":
    main()
