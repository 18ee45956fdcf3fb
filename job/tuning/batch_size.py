"""`--tune`: measure the fastest rows per forward on the job's own search, once, and remember them.

Otherwise a rule sets the rows (`job.preflight.memory_plan`). Either way they are pinned in job.json before the first
trial is sampled, and no later start changes them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import optuna

from job.config.schema import Settings
from job.data.prompts import Prompt, PromptSets
from job.directions.residuals import extract_residuals
from job.edits.hooks import Intervention
from job.errors import ImpossibleJobError, MachineError
from job.model.device_faults import Shortage, halving, within_memory
from job.model.devices import hardware
from job.model.loading import LoadedModel
from job.numerics.basis import Basis
from job.numerics.directions import mean_difference
from job.records import JobRecord
from job.scoring.trial_scorer import TrialScorer
from job.search.space import SearchSpace
from job.storage.events import Events
from job.tuning.layouts import LAYOUTS, Layouts, MeasuredLayout, Remembered, best_of, climb, read_layouts, remember
from job.tuning.memory_probe import Gauge

# No measurement starts after this time. One takes about a quarter of it at most, as far as predictable.
SECONDS = 300.0
# Time limit of measuring the rule's layout, in seconds; beyond it fewer prompts are answered.
_LONGEST = 30.0
# Prompts of either kind; more would not make more rows worth trying than fit a forward anyway.
_PROMPTS = 256
# Prompts of either kind for its direction.
_DIRECTION_PROMPTS = 32
# Start of the doubling.
_BEGIN = 16
# Short measurements are repeated, and the fastest counts, which other load disturbs least.
_ROUNDS, _QUICK = 3, 2.0
# Repetitions of the best layout's measurement beside the rule's, which stays if that was only luck.
_CONFIRMATIONS = 2


@dataclass(frozen=True)
class Tuner:
    """Finds the fastest rows per forward for a job's trials.

    Attributes:
        workspace: Where layouts are remembered.
        scorer: Makes a measured scorer from good and bad prompts and rows.
    """

    workspace: Path
    record: JobRecord
    settings: Settings
    prompts: PromptSets
    loaded: LoadedModel
    scorer: Callable[[Sequence[Prompt], Sequence[Prompt], int], TrialScorer]
    together: int
    workers: int
    events: Events

    def rows(self, rule: int) -> int:
        """Return the rows per forward, remembered or measured. Raises ImpossibleJobError or MachineError."""
        layouts, about = read_layouts(self.workspace), self._layout_inputs()
        if layouts is None:
            self.events.say(
                f"warning: {self.workspace / LAYOUTS} is unreadable or of another program and stays as it is"
            )
        known = self._remembered(layouts or Layouts(), about)
        if known is not None:
            self.events.emit(
                "tuned",
                f"{known.chosen.rows} rows per forward pass, as measured earlier for this model and device",
                rows=known.chosen.rows,
                remembered=True,
            )
            return known.chosen.rows
        found = self._measured(rule)
        chosen = best_of(found)
        if chosen is None:
            raise Shortage("").error()
        self.events.emit(
            "tuned",
            f"{chosen.rows} rows per forward pass; seconds per trial: {', '.join(map(_described, found))}",
            rows=chosen.rows,
            rule=rule,
            remembered=False,
            measured=[one.model_dump() for one in found],
        )
        if layouts is not None:
            try:
                remember(self.workspace, layouts, Remembered(about=about, chosen=chosen, measured=found))
            except MachineError as error:
                # Only a cache for later jobs: this one has its layout.
                self.events.say(f"warning: the measured batch size is not stored: {error.line}")
        return chosen.rows

    def _layout_inputs(self) -> dict[str, Any]:
        """Return everything that determines the fastest layout."""
        settings = self.settings
        good, bad = self._sets
        longest = max(map(len, self.loaded.tokenize([*good, *bad])), default=1)
        return {
            "model": self.record.identity["model"],
            "commit": self.record.model_commit,
            "versions": self.record.versions,
            "device": hardware(self.loaded.device),
            "workers": self.workers,
            "dtype": self.loaded.dtype,
            "loading": [settings.loading.device_map, settings.loading.quantization],
            "norms": settings.ablation.row_normalization,
            "prompts": [len(good), len(bad)],
            # Rounded up to powers of two: slightly longer prompts have the same fastest layout.
            "prompt_tokens": 1 << (longest - 1).bit_length(),
            "answer_tokens": settings.scoring.effective_search_tokens,
            "kl_tokens": settings.kl_tokens,
            "skip_kl_above": settings.skip_kl_above,
            "together": self.together,
        }

    def _length_ratio(self) -> float:
        """Return how much longer the job's longest row is than the search's, responses included."""
        scoring, prompts = self.settings.scoring, self.prompts
        extraction = (prompts.of_setting("good_prompts"), prompts.of_setting("bad_prompts"))
        others = (*extraction, prompts.good_report, prompts.bad_report)
        longest, longest_elsewhere = (
            max((len(tokens) for found in sets for tokens in self.loaded.tokenize(found)), default=0)
            for sets in (self._sets, others)
        )
        search = longest + scoring.effective_search_tokens
        return (max(longest, longest_elsewhere) + scoring.answer_tokens) / search

    @property
    def _sets(self) -> tuple[Sequence[Prompt], Sequence[Prompt]]:
        return self.prompts.good_search, self.prompts.bad_search

    def _remembered(self, layouts: Layouts, about: dict[str, Any]) -> Remembered | None:
        for one in layouts.layouts:
            if one.about == about and Gauge(self.loaded.model, self.workers).fits(one.chosen.growth):
                return one
        return None

    def _measured(self, rule: int) -> list[MeasuredLayout]:
        self.events.emit("tuning", f"measuring which batch size is fastest, for at most about {SECONDS / 60:g} minutes")
        begun = time.monotonic()
        loaded, mode, rule = self.loaded, self.settings.ablation.row_normalization, max(rule, self.together)
        with Intervention(loaded.model, loaded.architecture, self._basis(rule), mode) as intervention:
            prompts, rule = self._warmed_up(intervention, rule)
            gauge = Gauge(loaded.model, self.workers)
            bench = Bench(self._score(intervention, prompts, rule), gauge, self.together, self._length_ratio())
            good, bad = (min(len(found), prompts) for found in self._sets)
            good *= self.settings.kl_tokens
            most = _power(self.together * max(good, bad))
            rule = min(rule, most)
            taken = self.together * (bench.measure(rule).seconds or 0)
            # With few rows none takes a quarter of the time, even if it is proportionally slower.
            first = max(_power(self.together), _power(int(4 * rule * taken / SECONDS)), _BEGIN)
            found = climb(
                bench.measure,
                # Number of forwards for either kind of prompts.
                lambda rows: tuple(-(-count // (rows // self.together)) for count in (good, bad)),
                rule=rule,
                rows=(self.together, min(first, most), most),
                may_go_on=lambda: time.monotonic() - begun < SECONDS,
            )
            for _ in range(_CONFIRMATIONS):
                chosen = best_of(found)
                if chosen is not None and chosen.rows != rule and time.monotonic() - begun < SECONDS:
                    found = [bench.again(one) if one.rows in (rule, chosen.rows) else one for one in found]
            return found

    def _basis(self, rows: int) -> Basis:
        """Return one direction per layer from few prompts: the search's own needs the rows first."""
        tokens = [
            self.loaded.tokenize(_evenly_spaced(prompts, _DIRECTION_PROMPTS))
            for prompts in (self.prompts.good, self.prompts.bad)
        ]
        residuals, _ = halving(
            rows,
            lambda rows: [extract_residuals(self.loaded, some, rows, lambda _: None)[:, 1:] for some in tokens],
            self.events.say,
        )
        try:
            return Basis.single(mean_difference(*residuals))
        except ValueError as error:
            raise ImpossibleJobError(str(error), remedy="check that good_prompts and bad_prompts differ") from error

    def _warmed_up(self, intervention: Intervention, rule: int) -> tuple[int, int]:
        """Score once; return how many prompts of either kind there is time for, and the rows that fit."""
        prompts = -(-rule // self.together)
        score = self._score(intervention, prompts, rule)
        begun = time.monotonic()
        _, rows = halving(rule, score, self.events.say)
        affordable = int(prompts * _LONGEST / (time.monotonic() - begun))
        return min(max(affordable, prompts), _PROMPTS), max(rows, self.together)

    def _score(self, intervention: Intervention, prompts: int, rows: int) -> Callable[[int], object]:
        """Return a function of rows that scores sampled edits on `prompts` prompts of either kind."""
        space = SearchSpace(self.settings.search.space, self.loaded.architecture.layer_count)
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=self.settings.seed))
        edits = [space.edit(study.ask(space.distributions()).params) for _ in range(self.together)]
        good, bad = (_evenly_spaced(found, prompts) for found in self._sets)
        scorer = self.scorer(good, bad, rows)
        scoring, limit = self.settings.scoring, self.settings.skip_kl_above
        return lambda rows: scorer.scores(
            intervention, edits, rows, skip_kl_above=limit, response_tokens=scoring.effective_search_tokens
        )


class Bench:
    """Measures layouts within the available memory."""

    def __init__(self, score: Callable[[int], object], gauge: Gauge, trials: int, stretch: float) -> None:
        """`score` scores `trials` trials with given rows; `stretch` scales memory to the job's longest rows."""
        self._length_ratio = stretch
        self._score = score
        self._gauge = gauge
        self._trials = trials
        self._done: dict[int, MeasuredLayout] = {}

    def measure(self, rows: int) -> MeasuredLayout:
        """Measure a layout, once."""
        if rows not in self._done:
            self._done[rows] = self._measured(rows) if self._may_fit(rows) else MeasuredLayout(rows=rows, seconds=None)
        return self._done[rows]

    def again(self, before: MeasuredLayout) -> MeasuredLayout:
        """Measure a layout again and return the faster time; one that does not fit is returned unchanged."""
        if before.seconds is None:
            return before
        now = self._measured(before.rows)
        if now.seconds is not None:
            now = now.model_copy(update={"seconds": min(before.seconds, now.seconds)})
        return now

    def _may_fit(self, rows: int) -> bool:
        """Extrapolate whether rows fit from fewer rows: on a CPU it is too late once memory runs out."""
        smaller = [one for one in self._done.values() if one.rows < rows and one.seconds is not None]
        nearest = max(smaller, key=lambda one: one.rows, default=None)
        return nearest is None or self._gauge.fits([taken * rows / nearest.rows for taken in nearest.growth])

    def _measured(self, rows: int) -> MeasuredLayout:
        self._gauge.begin()
        times = within_memory(partial(self._times, rows))
        if isinstance(times, Shortage):
            return MeasuredLayout(rows=rows, seconds=None)
        growth = tuple(int(self._length_ratio * taken) for taken in self._gauge.growth())
        return MeasuredLayout(
            rows=rows, seconds=min(times) / self._trials if self._gauge.fits(growth) else None, growth=growth
        )

    def _times(self, rows: int) -> list[float]:
        times: list[float] = []
        while len(times) < _ROUNDS and sum(times) < _QUICK:
            begun = time.perf_counter()
            self._score(rows)
            times.append(time.perf_counter() - begun)
        return times


def _described(measured: MeasuredLayout) -> str:
    return f"{measured.rows} rows {'no room' if measured.seconds is None else f'{measured.seconds:.3g}'}"


def _power(number: int) -> int:
    return 1 << max(number - 1, 0).bit_length()


def _evenly_spaced(prompts: Sequence[Prompt], count: int) -> list[Prompt]:
    """Return `count` evenly spaced prompts, or all."""
    count = min(count, len(prompts))
    return [prompts[index * len(prompts) // count] for index in range(count)]
