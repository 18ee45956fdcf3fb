"""Seconds per trial with and without a shared prefix, for short and full responses, and the cost of refusal detection.

python -m benchmarks.decoding ORGANISM [SYSTEM PROMPT]      a folder made by `abliterate demo-model`
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import optuna

from job.config.load import default_values
from job.config.sections import LoadingSettings
from job.data.prompts import Prompt
from job.directions.residuals import extract_residuals
from job.edits.hooks import Intervention
from job.generation.stop_markers import MarkerWatch
from job.model.loading import LoadedModel, load_model
from job.numerics.basis import Basis
from job.numerics.directions import mean_difference
from job.scoring.prompt_batches import PromptBatches
from job.scoring.trial_scorer import TrialScorer
from job.search.space import SearchSpace
from job.text.refusal_markers import RefusalMarkers

TRIALS, BATCH, ROWS, ROUNDS = 8, 4, 256, 5


def medians(ways: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    """Return the median seconds of each variant, run in turn."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(ROUNDS):
        for name, way in ways.items():
            begin = time.perf_counter()
            way()
            times[name].append(time.perf_counter() - begin)
    return {name: statistics.median(found) for name, found in times.items()}


def watching(loaded: LoadedModel, markers: RefusalMarkers) -> dict[str, float]:
    """Return the seconds to watch a response of 100 tokens, incrementally and by rereading it every 4 tokens."""
    text = "The kettle is kept in the kitchen near the violin. " * 20
    tokens = loaded.tokenizer(text, add_special_tokens=False)["input_ids"][:100]
    watch = MarkerWatch(loaded.tokenizer, markers)

    def by_token() -> None:
        one = watch.begin("")
        for length in range(1, len(tokens) + 1):
            one.found(tokens[:length])

    def as_a_whole() -> None:
        for length in range(4, len(tokens) + 1, 4):
            watch.begin("").found_in(tokens[:length])

    return medians({"watched, every token": by_token, "looked at, every 4 tokens": as_a_whole})


def main() -> None:
    """Measure and print."""
    folder, system = Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else None
    given = {**default_values()["loading"], "response_prefix": ""}
    loaded = load_model(folder / "model", LoadingSettings.model_validate(given), print)
    sets = {
        name: [Prompt(user=line, system=system) for line in (folder / f"{name}.txt").read_text().splitlines()][:100]
        for name in ("good_train", "bad_train", "good_test", "bad_test")
    }
    residuals = [
        extract_residuals(loaded, loaded.tokenize(sets[name]), 64, lambda _: None)[:, 1:]
        for name in ("good_train", "bad_train")
    ]
    markers = RefusalMarkers(default_values()["scoring"]["refusal_markers"])
    on, off = (
        TrialScorer.measured(
            PromptBatches.of(loaded, sets["good_test"], sets["bad_test"], ROWS, least_prefix=least), markers, 100
        )
        for least in (1, 10**9)
    )
    space = SearchSpace("wide", loaded.architecture.layer_count)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    edits = [space.edit(study.ask(space.distributions()).params) for _ in range(TRIALS)]
    with Intervention(loaded.model, loaded.architecture, Basis.single(mean_difference(*residuals)), "none") as hooks:

        def way(scorer: TrialScorer, tokens: int) -> Callable[[], object]:
            batches = [edits[i : i + BATCH] for i in range(0, TRIALS, BATCH)]
            return lambda: [scorer.scores(hooks, batch, ROWS, response_tokens=tokens) for batch in batches]

        ways = {"prefix, 100 tokens": way(on, 100), "prefix, 30 tokens": way(on, 30), "no prefix": way(off, 100)}
        for warm_up in ways.values():
            warm_up()
        for name, seconds in medians(ways).items():
            print(f"{name:>26} {seconds / TRIALS:8.3f} s a trial")
    for name, seconds in watching(loaded, markers).items():
        print(f"{name:>26} {1e6 * seconds:8.0f} µs an answer of 100 tokens")


if __name__ == "__main__":
    main()
