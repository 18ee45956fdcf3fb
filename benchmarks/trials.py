"""Seconds a trial takes, by trials in a batch and rows in a forward, and how long it takes to switch trials.

python -m benchmarks.trials [ORGANISM] [--json FILE]      a folder made by `abliterate demo-model`; made if absent
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import optuna

from benchmarks.measuring import machine, write_figures
from job.demo import write_organism
from job.evaluation import Evaluator
from job.intervention import Intervention
from job.model import load_model
from job.numerics.basis import Basis
from job.numerics.directions import mean_difference
from job.prompts import Prompt
from job.residuals import extract_residuals
from job.scoring import RefusalMarkers
from job.search import SearchSpace
from job.settings import LoadingSettings, default_values

TRIALS, ROUNDS = 16, 3


def seconds(work: Callable[[], object]) -> float:
    """Return the median time of a piece of work."""
    times = []
    for _ in range(ROUNDS):
        begin = time.perf_counter()
        work()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("organism", nargs="?", type=Path, default=Path("runs/organism"))
    parser.add_argument("--json", type=Path, default=Path("runs/trials.json"))
    given = parser.parse_args()
    folder = given.organism
    write_organism(folder, arch="llama", size="tiny", seed=0, report=print)
    loaded = load_model(folder / "model", LoadingSettings.model_validate(default_values()["loading"]), print)
    sets = {
        name: [Prompt(user=line) for line in (folder / f"{name}.txt").read_text().splitlines()]
        for name in ("good_train", "bad_train", "good_test", "bad_test")
    }
    residuals = [
        extract_residuals(loaded, loaded.tokenize(sets[name]), 64, lambda _: None)[:, 1:]
        for name in ("good_train", "bad_train")
    ]
    markers = RefusalMarkers(default_values()["scoring"]["refusal_markers"])
    evaluator = Evaluator(
        loaded, sets["good_test"][:100], sets["bad_test"][:100], markers=markers, answer_tokens=100, rows=256
    )
    space = SearchSpace("wide", loaded.architecture.layer_count)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    edits = [space.edit(study.ask(space.distributions()).params) for _ in range(TRIALS)]
    basis = Basis.single(mean_difference(*residuals))
    print(f"{'norms kept':>10} {'K':>3} {'rows':>5} {'s/trial':>8} {'switch ms/trial':>16}")
    found = []
    for mode in ("none", "full"):
        with Intervention(loaded.model, loaded.architecture, basis, mode) as intervention:
            evaluator.scores(intervention, edits[:1], 256)  # warm-up
            for k in (1, 4, 16):
                batches = [edits[i : i + k] for i in range(0, TRIALS, k)]
                switch = seconds(lambda: [intervention.activate(batch) for batch in batches])  # noqa: B023 - called at once
                for rows in (64, 128, 256, 512):
                    took = seconds(lambda: [evaluator.scores(intervention, batch, rows) for batch in batches])  # noqa: B023 - likewise
                    one = {"norms": mode, "k": k, "rows": rows, "trial_s": took / TRIALS}
                    found.append(one | {"switch_ms": 1000 * switch / TRIALS})
                    print(
                        f"{mode:>10} {k:>3} {rows:>5} {took / TRIALS:8.3f} {1000 * switch / TRIALS:16.2f}", flush=True
                    )
    write_figures(given.json, {"machine": machine(loaded.device), "layouts": found})


if __name__ == "__main__":
    main()
