"""A run folder with very many trials, made fast, and its mirror's traffic: python -m tests.growth."""

from __future__ import annotations

import json
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState, create_trial

from job.mirror import MirrorOptions, open_mirror
from job.search.space import SearchSpace
from job.search.study import PLAN, STUDY_NAME, add_trials, file_url, open_study
from job.storage.run_folder import RunFolder
from tests.mirrors import CALM, IDENTITY, JOB, wait_until, write_folder

BATCH = 8
SPACE = SearchSpace("wide", 28)


class Growing:
    """A run folder whose study and event log grow as in a search."""

    def __init__(self, folder: Path) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.run = write_folder(folder, trials=0)
        self._study = open_study(file_url(self.run.study_file), STUDY_NAME)
        self._random, self.trials = random.Random(0), 0

    def grow(self, trials: int) -> None:
        """Add finished trials at once, with their log entries."""
        distributions = SPACE.distributions()
        numbers = range(self.trials, self.trials + trials)
        params = [{name: self._drawn(value) for name, value in distributions.items()} for _ in numbers]
        added = [self._trial(number, one, distributions) for number, one in zip(numbers, params, strict=True)]
        self._study.set_user_attr(PLAN, [{"first": self.trials, "parameters": params[-BATCH:], "rows": 16}])
        add_trials(self._study, added)
        self.trials += trials
        with self.run.events_file.open("a") as log:
            for number in numbers:
                fields = {"number": number, "refusals": number % 100, "kl": self._random.random(), "opening": 0.5}
                message = f"trial {number}: 12 of 100 refused, KL {self._random.random():.4g}"
                log.write(json.dumps({"time": time.time(), "event": "trial", "message": message, **fields}) + "\n")

    def _drawn(self, distribution: Any) -> Any:
        if isinstance(distribution, optuna.distributions.CategoricalDistribution):
            return self._random.choice(distribution.choices)
        return self._random.uniform(distribution.low, distribution.high)

    def _trial(self, number: int, params: dict[str, Any], distributions: dict[str, Any]) -> FrozenTrial:
        trial = create_trial(
            state=TrialState.COMPLETE,
            values=[float(number % 100), self._random.random()],
            params=params,
            distributions=distributions,
            user_attrs={"opening": self._random.random()},
        )
        trial.number = number
        return trial


class Sent:
    """A mirror in a folder, and the number of bytes written to it."""

    def __init__(self, root: Path, run: RunFolder) -> None:
        self._objects = root / JOB / "objects"
        self._mirror = open_mirror(root.as_uri(), MirrorOptions(pace=CALM))
        self.claim = self._mirror.claim(run, IDENTITY, lambda line: print(line, file=sys.stderr))
        self.claim.start()
        self.head_bytes = 0

    def snapshot(self) -> int:
        """Take a snapshot and return the bytes of new objects and of the head."""
        before, generation = self._names(), self.claim.head.generation
        self.claim.request()
        wait_until(lambda: self.claim.head.generation > generation, "no snapshot", 60)
        self.head_bytes = len(self.claim.head.encode())
        return sum((self._objects / name).stat().st_size for name in self._names() - before) + self.head_bytes

    def _names(self) -> set[str]:
        return {path.name for path in self._objects.glob("*.*")} if self._objects.exists() else set()

    def close(self) -> None:
        assert self.claim.close()


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        growing = Growing(Path(folder) / JOB)
        growing.grow(92)
        sent = Sent(Path(folder) / "mirror", growing.run)
        for target in (100, 1_000, 10_000):
            growing.grow(max(target - growing.trials - 16 * BATCH, 0) or BATCH)
            first = sent.snapshot()
            begun, batches = time.monotonic(), []
            for _ in range(16):
                growing.grow(BATCH)
                batches.append(sent.snapshot())
            seconds = (time.monotonic() - begun) / 16
            size = growing.run.study_file.stat().st_size + growing.run.events_file.stat().st_size
            print(
                f"{growing.trials:6d} trials, {size / 1e6:6.2f} MB: {sum(batches) / 16 / 1e3:8.1f} kB a batch "
                f"({max(batches) / 1e3:.0f} at most, the first {first / 1e3:.0f}, head {sent.head_bytes / 1e3:.1f}), "
                f"{seconds:.2f} s"
            )
        sent.close()


if __name__ == "__main__":
    main()
