"""Quality of searches: hypervolume by number of trials, for the job's search and variants that differ in one thing.

python -m benchmarks.samplers ORGANISM... [--variants NAME...] [--seeds 5] [--trials 48] [--at 24 48] [--json FILE]

An organism is a folder made by `abliterate demo-model`. Every variant runs the job's own search with its own scorer; an
edit that several variants try is evaluated once. The hypervolume is that of `benchmarks.peer`: of the refusal rate and
of KL up to 1. Seconds are CPU time of planning trials.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.samplers import BaseSampler, GPSampler, RandomSampler, TPESampler
from optuna.trial import FrozenTrial

from job.config.load import default_values
from job.config.sections import LoadingSettings
from job.data.prompts import Prompt
from job.directions.residuals import extract_residuals
from job.edits.hooks import Intervention
from job.model.loading import load_model
from job.numerics.basis import Basis
from job.numerics.directions import mean_difference
from job.records import TRIALS_PER_WORKER, EditParameters, Plan, Trial, TrialScores
from job.scoring.prompt_batches import PromptBatches
from job.scoring.trial_scorer import TrialScorer
from job.search.convergence import hypervolume
from job.search.optimizer import Search, StudySettings
from job.search.space import SearchSpace
from job.text.refusal_markers import RefusalMarkers

ROWS = 512
# What the sampler sees instead of the scores, by trial and number of prompts.
Seen = Callable[[list[float], FrozenTrial, int], list[float]]


def counts(shown: list[float], trial: FrozenTrial, prompts: int) -> list[float]:
    """Show scores as measured, so that edits with equal refusals differ in KL alone."""
    return list(trial.values)


def at_least(kl: float) -> Seen:
    """Show KL of at least this, so that edits that do nothing attract no search."""
    return lambda shown, trial, prompts: [shown[0], max(shown[1], kl)]


def tilted(share: float) -> Seen:
    """Mix a share of each score into the other, so that the front requires larger differences."""

    def seen(shown: list[float], trial: FrozenTrial, prompts: int) -> list[float]:
        refusals = shown[0] / prompts
        return [refusals + share * shown[1], shown[1] + share * refusals]

    return seen


class OtherField(SearchSpace):
    """The field's space with heretic 1.4.0's range for the MLP weights."""

    def distributions(self) -> dict[str, BaseDistribution]:
        """Return the range of every parameter."""
        return {**super().distributions(), "mlp.max_weight": FloatDistribution(0.8, 1.5)}


class Tied(SearchSpace):
    """The wide space with one kernel for both components except its strength."""

    def distributions(self) -> dict[str, BaseDistribution]:
        """Return the range of every parameter."""
        whole = super().distributions()
        return {name: whole[name] for name in whole if not name.startswith("mlp.") or name == "mlp.max_weight"}

    def known_points(self) -> list[dict[str, Any]]:
        """Return the parameters to try before any other."""
        return [{name: point[name] for name in self.distributions()} for point in super().known_points()]

    def edit(self, params: dict[str, Any]) -> EditParameters:
        """Return the edit of a trial's parameters."""
        shared = {name.replace("attention.", "mlp."): value for name, value in params.items()}
        return super().edit({**shared, **params})


class Others(SearchSpace):
    """The wide space with few other initial points."""

    def known_points(self) -> list[dict[str, Any]]:
        """Return the known points of one direction at depths 0.35, 0.5 and 0.65 and of each layer's own."""
        points = super().known_points()
        other = [{**points[0], "direction_index": depth * (self.layers - 1)} for depth in (0.35, 0.5, 0.65)]
        return [points[2], *other]


@dataclass(frozen=True)
class Spread(SearchSpace):
    """The wide space with evenly spread start-up trials, by the R sequence, instead of random ones.

    Attributes:
        seed: Start of the sequence.
        startup: Number of points.
    """

    seed: int = 0
    startup: int = 0

    def known_points(self) -> list[dict[str, Any]]:
        """Return the points of the sequence."""
        ranges = self.distributions()
        root = 2.0
        for _ in range(60):
            root = (1 + root) ** (1 / (len(ranges) + 1))
        offsets = [random.Random(f"{self.seed}:{name}").random() for name in ranges]
        return [
            {
                name: _at((offset + (number + 1) * root ** -(axis + 1)) % 1, ranges[name])
                for axis, (name, offset) in enumerate(zip(ranges, offsets, strict=True))
            }
            for number in range(self.startup)
        ]


@dataclass(frozen=True)
class Begun(SearchSpace):
    """The wide space with points before the known ones.

    Attributes:
        points: Those points.
    """

    points: tuple[dict[str, Any], ...] = ()

    def known_points(self) -> list[dict[str, Any]]:
        """Return the points to try before any other."""
        return [*self.points, *super().known_points()]


def _at(share: float, distribution: BaseDistribution) -> Any:
    if isinstance(distribution, CategoricalDistribution):
        return distribution.choices[int(share * len(distribution.choices))]
    assert isinstance(distribution, FloatDistribution)
    return distribution.low + share * (distribution.high - distribution.low)


@dataclass(frozen=True)
class Variant:
    """A search that differs from the job's in its non-default attributes.

    Attributes:
        space: The space of edits.
        settings: Changed search settings.
        sampler: The sampler, by its seed.
        tpe: Changed arguments of the TPE sampler.
        seen: A trial as the sampler sees it.
        spread: Whether start-up trials are spread evenly.
        normed: Whether the last layer's residuals are taken after the model's final norm.
        first: Points to try before any other, given the organism and another one.
    """

    space: Callable[[int], SearchSpace] = lambda layers: SearchSpace("wide", layers)
    settings: dict[str, Any] = field(default_factory=dict)
    sampler: Callable[[int], BaseSampler] | None = None
    tpe: dict[str, Any] = field(default_factory=dict)
    seen: Seen | None = None
    spread: bool = False
    normed: bool = False
    first: Callable[[Organism, Organism | None], list[dict[str, Any]]] | None = None


def by_separation(organism: Organism, _: Organism | None) -> list[dict[str, Any]]:
    """Return full ablation of one direction, for the four layers that separate prompts best."""
    point = SearchSpace("wide", organism.layers).known_points()[0]
    order = sorted(range(organism.layers // 5, organism.layers), key=lambda layer: -organism.separation[layer])
    return [{**point, "direction_index": float(layer)} for layer in order[:4]]


def from_another(organism: Organism, other: Organism | None) -> list[dict[str, Any]]:
    """Return the four trials with fewest refusals on another organism's front, at the same depths."""
    assert other is not None, "--other is needed"
    done, _ = searched(other, VARIANTS["default"], 100, 48)
    front = [trial for trial in done if not any(_dominates(rival, trial) for rival in done)]
    front.sort(key=lambda trial: (trial.values.unanswered, trial.values.kl))
    deeper = (organism.layers - 1) / (other.layers - 1)
    ranges = SearchSpace("wide", organism.layers).distributions()
    points = []
    for trial in front[:4]:
        point = dict(trial.params)
        for name in point:
            if name.endswith(("index", "position", "distance")):
                held = ranges[name]
                assert isinstance(held, FloatDistribution)
                point[name] = min(max(point[name] * deeper, held.low), held.high)
        points.append(point)
    return points


def _dominates(one: Trial, other: Trial) -> bool:
    better, worse = ((trial.values.unanswered, trial.values.kl) for trial in (one, other))
    return better != worse and better[0] <= worse[0] and better[1] <= worse[1]


def _field(layers: int) -> SearchSpace:
    return SearchSpace("field", layers)


_NONE_KNOWN = {"known_points": False}
# "nothing known": the search begins with random trials alone.
VARIANTS = {
    "default": Variant(),
    "nothing known": Variant(settings=_NONE_KNOWN),
    "random": Variant(settings=_NONE_KNOWN, sampler=lambda seed: RandomSampler(seed=seed)),
    "other known points": Variant(space=lambda layers: Others("wide", layers)),
    "8 start-up trials": Variant(settings={"startup_trials": 8}),
    "nothing known, 8 start-up trials": Variant(settings={**_NONE_KNOWN, "startup_trials": 8}),
    "spread": Variant(spread=True),
    "24 candidates": Variant(settings={"ei_candidates": 24}),
    "nothing known, 24 candidates": Variant(settings={**_NONE_KNOWN, "ei_candidates": 24}),
    "counts": Variant(settings=_NONE_KNOWN, seen=counts),
    "KL at least 0.01": Variant(settings=_NONE_KNOWN, seen=at_least(0.01)),
    "tilted by 0.1": Variant(settings=_NONE_KNOWN, seen=tilted(0.1)),
    "one sum": Variant(settings=_NONE_KNOWN, seen=tilted(1.0)),
    "independent": Variant(settings=_NONE_KNOWN, tpe={"multivariate": False}),
    "tied": Variant(settings=_NONE_KNOWN, space=lambda layers: Tied("wide", layers)),
    "after the final norm": Variant(settings=_NONE_KNOWN, normed=True),
    "batches of 8": Variant(settings={**_NONE_KNOWN, "batch": 8}),
    "batches of 16": Variant(settings={**_NONE_KNOWN, "batch": 16}),
    "eight": Variant(settings={"batch": 8}),
    "one ahead": Variant(settings={"ahead": 1}),
    "eight, one ahead": Variant(settings={"batch": 8, "ahead": 1}),
    "sixteen, one ahead": Variant(settings={"batch": 16, "ahead": 1}),
    "sixteen, two ahead": Variant(settings={"batch": 16, "ahead": 2}),
    "field": Variant(space=_field),
    "field, nothing known": Variant(space=_field, settings=_NONE_KNOWN),
    "field, counts": Variant(space=_field, settings=_NONE_KNOWN, seen=counts),
    "field, random": Variant(space=_field, settings=_NONE_KNOWN, sampler=lambda seed: RandomSampler(seed=seed)),
    "field, MLP from 0.8": Variant(space=lambda layers: OtherField("field", layers), settings=_NONE_KNOWN),
    "separating layers first": Variant(first=by_separation),
    "another's best first": Variant(first=from_another),
    # Needs scipy, which the job does not.
    "Gaussian process": Variant(settings=_NONE_KNOWN, sampler=lambda seed: GPSampler(seed=seed, n_startup_trials=16)),
    "known points, then a Gaussian process": Variant(sampler=lambda seed: GPSampler(seed=seed, n_startup_trials=8)),
}


class Tried(Search):
    """The job's search with a variant's differences.

    Attributes:
        seconds: CPU time of planning.
    """

    def __init__(self, file: Path, variant: Variant, space: SearchSpace, settings: StudySettings, prompts: int):
        super().__init__(file, space, settings)
        self._variant = variant
        self._prompts = prompts
        self.seconds = 0.0

    def _next_plan(self, unfinished: Sequence[Plan], first: int, target: int) -> Plan:
        began = time.process_time()
        plan = super()._next_plan(unfinished, first, target)
        self.seconds += time.process_time() - began
        return plan

    def _sampler(self, number: int) -> BaseSampler:
        sampler = super()._sampler(number)
        seed = random.Random(f"{self._settings.seed}:{number}").getrandbits(32)
        if self._variant.sampler is not None:
            return self._variant.sampler(seed)
        if self._variant.tpe:
            arguments = {
                **{"n_startup_trials": self._settings.startup_trials, "n_ei_candidates": self._settings.ei_candidates},
                **{"multivariate": True, "constant_liar": True, "seed": seed},
            }
            return TPESampler(**{**arguments, **self._variant.tpe})
        return sampler

    def _sampled(self, trial: FrozenTrial) -> list[float]:
        shown = super()._sampled(trial)
        return self._variant.seen(shown, trial, self._prompts) if self._variant.seen else shown


class Organism:
    """A loaded model with its directions and the scores of all edits tried."""

    def __init__(self, folder: Path, prompts: int, tokens: int, system: str | None):
        """Load it and find its directions, as a job does.

        Args:
            folder: The organism.
            prompts: Number of good prompts, and of bad ones, that edits are scored on.
            tokens: Maximum response length.
            system: The system prompt of all prompts.
        """
        self.prompts, self._tokens = prompts, tokens
        loading = {**default_values()["loading"], "device": "cpu", "dtypes": ["float32"]}
        self._loaded = load_model(folder / "model", LoadingSettings.model_validate(loading), print)
        sets = {
            name: [Prompt(user=line, system=system) for line in (folder / f"{name}.txt").read_text().splitlines()]
            for name in ("good_train", "bad_train", "good_test", "bad_test")
        }
        markers = RefusalMarkers(default_values()["scoring"]["refusal_markers"])
        good, bad = sets["good_test"][:prompts], sets["bad_test"][:prompts]
        self._scorer = TrialScorer.measured(PromptBatches.of(self._loaded, good, bad, ROWS), markers, 100)
        self._residuals = [
            extract_residuals(self._loaded, self._loaded.tokenize(sets[name]), 64, lambda _: None)[:, 1:]
            for name in ("good_train", "bad_train")
        ]
        self._scores: dict[str, TrialScores] = {}

    @property
    def layers(self) -> int:
        """Number of layers."""
        return self._loaded.architecture.layer_count

    @property
    def separation(self) -> list[float]:
        """Separation of the two prompt classes along each layer's direction, in standard deviations."""
        good, bad = self._residuals
        along = torch.nn.functional.normalize(bad.mean(0) - good.mean(0), dim=-1)
        first, second = ((found * along).sum(-1) for found in (good, bad))  # [n, layers]
        spread = ((first.var(0) + second.var(0)) / 2).sqrt()
        return ((second.mean(0) - first.mean(0)) / spread).tolist()

    def hooks(self, normed: bool) -> Intervention:
        """Return the hooks for its directions; `normed`: the last layer's from residuals after the final norm."""
        residuals = self._residuals
        if normed:
            norm = self._loaded.model.get_decoder().norm
            with torch.inference_mode():
                residuals = [torch.cat([found[:, :-1], norm(found[:, -1:])], dim=1) for found in residuals]
        basis = Basis.single(mean_difference(*residuals))
        return Intervention(self._loaded.model, self._loaded.architecture, basis, "none")

    def scores(self, hooks: Intervention, kind: str, edits: Sequence[EditParameters]) -> list[TrialScores]:
        """Return the scores of edits, cached by kind of hooks."""
        keys = [f"{kind} {edit.model_dump_json()}" for edit in edits]
        new = {key: edit for key, edit in zip(keys, edits, strict=True) if key not in self._scores}
        if new:
            found = self._scorer.scores(hooks, list(new.values()), ROWS, response_tokens=self._tokens)
            self._scores |= dict(zip(new, found, strict=True))
        return [self._scores[key] for key in keys]


def searched(
    organism: Organism, variant: Variant, seed: int, trials: int, other: Organism | None = None
) -> tuple[list[Trial], float]:
    """Return the trials of one search and the CPU seconds of planning one."""
    startup = min(60, math.ceil(trials / 3))
    defaults = {"batch": TRIALS_PER_WORKER, "ahead": 0, **default_values()["search"], "startup_trials": startup}
    del defaults["space"]
    settings = StudySettings(**{**defaults, "seed": seed, "rows": ROWS, **variant.settings})
    space = variant.space(organism.layers)
    if variant.spread:
        space = Spread("wide", organism.layers, seed=seed, startup=settings.startup_trials)
    if variant.first is not None:
        space = Begun("wide", organism.layers, points=tuple(variant.first(organism, other)))
    with tempfile.TemporaryDirectory() as folder, organism.hooks(variant.normed) as hooks:
        search = Tried(Path(folder) / "study.db", variant, space, settings, organism.prompts)

        def evaluate(plans: Sequence[Plan]) -> list[TrialScores]:
            return organism.scores(hooks, str(variant.normed), [space.edit(params) for params in plans[0].parameters])

        search.run(trials, evaluate, told=lambda _: None)
        return search.finished(), search.seconds / trials


def measured(
    name: str, organism: Organism, seeds: int, trials: int, marks: Sequence[int], other: Organism | None
) -> dict[str, Any]:
    """Return the figures of searches over all seeds, after each number of trials."""
    found = [searched(organism, VARIANTS[name], seed, trials, other) for seed in range(seeds)]
    row: dict[str, Any] = {"variant": name, "sampler_s": statistics.mean(seconds for _, seconds in found)}
    for mark in marks:
        usable = [[t.values for t in done[:mark] if t.values.reason is None] for done, _ in found]
        points = [[(v.refusals / organism.prompts, min(v.kl, 1.0)) for v in search] for search in usable]
        row[str(mark)] = {
            "volumes": [hypervolume(search) for search in points],
            "fewest": [min(search, default=(1.0, 1.0))[0] for search in points],
        }
    return row


def show(row: dict[str, Any], marks: Sequence[int]) -> None:
    """Print a variant's row."""
    cells = []
    for mark in marks:
        volumes, fewest = (row[str(mark)][key] for key in ("volumes", "fewest"))
        error = statistics.stdev(volumes) / math.sqrt(len(volumes)) if len(volumes) > 1 else math.nan
        cells.append(f"{statistics.mean(volumes):.3f} ± {error:.3f} {statistics.mean(fewest):.2f}")
    print(f"{row['variant']:>34}  {'   '.join(cells)} {1000 * row['sampler_s']:7.1f}", flush=True)


def main() -> None:
    """Print a table for every organism."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("organisms", nargs="+", type=Path)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=["default", "nothing known", "random"])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--trials", type=int, default=48)
    parser.add_argument(
        "--at", nargs="+", type=int, default=[24, 48], help="numbers of trials that volumes are given at"
    )
    parser.add_argument("--prompts", type=int, default=50)
    parser.add_argument("--tokens", type=int, default=default_values()["scoring"]["search_tokens"])
    parser.add_argument("--system", help="a system prompt")
    parser.add_argument("--other", type=Path, help="an organism whose search may be learnt from")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    rows = []
    other = Organism(given.other, given.prompts, given.tokens, given.system) if given.other else None
    for folder in given.organisms:
        organism = Organism(folder, given.prompts, given.tokens, given.system)
        after = ", ".join(map(str, given.at))
        print(f"{folder}: hypervolume, mean ± standard error of {given.seeds} seeds, and fewest refusals after {after}")
        print("trials; ms that planning a trial took")
        for name in given.variants:
            row = measured(name, organism, given.seeds, given.trials, given.at, other)
            show(row, given.at)
            rows.append({"organism": str(folder), **row})
            if given.json:
                given.json.write_text(json.dumps({"settings": vars(given), "rows": rows}, default=str, indent=1) + "\n")


if __name__ == "__main__":
    main()
