"""True refusals and KL of the chosen edit, by the former rule and by upper confidence bounds, in a simulation.

python -m benchmarks.choosing [--draws 300] [--json FILE]

A draw is a search: trials with a true refusal rate and a true KL, refusals counted by chance, and KL of every prompt as
the true one times a heavy-tailed factor, half of whose spread prompts share between trials. The relative standard error
of a mean of 100 prompts is a half. Rules see counts and prompts' KL, never the truth. The choice itself is that of
`job.search`. Directions from fewer prompts, the price of holding some out, are no part of it.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.measuring import write_figures
from job.records import FinalistScores, Trial, TrialScores
from job.search.choice import Choice
from job.search.pareto import choose

TOLERANCE = 0.02
# Spread of the logarithm of a prompt's KL: the relative deviation of a prompt is 5, of a mean of 100 a half.
SPREAD, SHARED = 1.8, 0.5


@dataclass(frozen=True)
class Scenario:
    """A kind of search.

    Attributes:
        searched: Bad and good prompts each of the search.
        held_out: Those held out for the choice.
        kl: True KL of the gentlest and of the strongest edit without waste, nats.
        steepness: Range of how fast refusals fall with strength.
    """

    name: str
    trials: int
    searched: int
    held_out: int
    kl: tuple[float, float] = (0.02, 0.4)
    steepness: tuple[float, float] = (15.0, 30.0)


SCENARIOS = (
    Scenario("60 trials, 100 prompts, 40 held out", 60, 100, 40),
    Scenario("200 trials, 100 prompts, 40 held out", 200, 100, 40),
    Scenario("200 trials, 50 prompts, 80 held out", 200, 50, 80),
    Scenario("200 trials, 50 prompts, none held out", 200, 50, 0),
    Scenario("60 trials, 100 prompts, 40 held out, larger KL", 60, 100, 40, kl=(0.1, 4.0)),
    Scenario("60 trials, 100 prompts, 40 held out, refusals fall slowly", 60, 100, 40, steepness=(8.0, 16.0)),
)


@dataclass(frozen=True)
class Draw:
    """One search: true rates and KL, counts and prompts' KL of search and held-out prompts, by trial."""

    rates: np.ndarray
    kls: np.ndarray
    counts: tuple[np.ndarray, np.ndarray]
    prompts: tuple[np.ndarray, np.ndarray]

    @classmethod
    def of(cls, scenario: Scenario, seed: int) -> Draw:
        """Return a search, by the seed alone."""
        source = np.random.default_rng(seed)
        strength = source.beta(1.5, 1.5, scenario.trials)
        waste = source.exponential(0.4, scenario.trials)
        low, high = scenario.kl
        kls = low * (high / low) ** strength * np.exp(waste + source.normal(0, 0.2, scenario.trials))
        fall = source.uniform(*scenario.steepness) * strength
        rates = np.minimum(1.0, 0.8 * np.exp(source.normal(0, 0.5, scenario.trials) - fall))
        parts = (scenario.searched, scenario.held_out)
        counts = tuple(source.binomial(part, rates) for part in parts)
        prompts = tuple(kls[:, None] * _factors(source, scenario.trials, part) for part in parts)
        return cls(rates, kls, (counts[0], counts[1]), (prompts[0], prompts[1]))

    @property
    def trials(self) -> list[Trial]:
        """The trials as the search knows them."""
        kls = self.prompts[0].mean(1)
        return [
            Trial(number=number, params={}, values=TrialScores(refusals=int(refusals), kl=float(kl)))
            for number, (refusals, kl) in enumerate(zip(self.counts[0], kls, strict=True))
        ]

    def measured(self, numbers: Sequence[int]) -> dict[int, FinalistScores]:
        """Return what is measured of finalists."""
        found = {}
        for number in numbers:
            kl = tuple(np.concatenate([part[number] for part in self.prompts]).tolist())
            found[number] = FinalistScores(refusals=int(self.counts[1][number]), broken=0, kl=kl, forced_kl=kl)
        return found


def _factors(source: np.random.Generator, trials: int, prompts: int) -> np.ndarray:
    shared, own = source.normal(size=(1, prompts)), source.normal(size=(trials, prompts))
    spread = math.sqrt(SHARED) * shared + math.sqrt(1 - SHARED) * own
    return np.exp(SPREAD * spread - SPREAD**2 / 2)


def by_counts(draw: Draw, scenario: Scenario) -> int:
    """Choose as former versions did."""
    return choose(draw.trials, scenario.searched, TOLERANCE).number


def by_bounds(draw: Draw, scenario: Scenario) -> int:
    """Choose as the job does."""
    trials = draw.trials
    choice = Choice(True, TOLERANCE, (scenario.searched, scenario.searched), scenario.held_out)
    finalists = [trial.number for trial in choice.unmeasured(trials)]
    return choice.with_measured(draw.measured(finalists)).chosen(trials).number


RULES: dict[str, Callable[[Draw, Scenario], int]] = {"former": by_counts, "bounds": by_bounds}


def simulate(scenario: Scenario, draws: int) -> dict[str, dict[str, float]]:
    """Return each rule's mean true refusal rate and KL, with the standard error of its difference from the former."""
    truths: dict[str, list[tuple[float, float]]] = {name: [] for name in RULES}
    for seed in range(draws):
        draw = Draw.of(scenario, seed)
        for name, rule in RULES.items():
            number = rule(draw, scenario)
            truths[name].append((float(draw.rates[number]), float(draw.kls[number])))
    return {name: _summary(found, truths["former"]) for name, found in truths.items()}


def _summary(found: Sequence[tuple[float, float]], former: Sequence[tuple[float, float]]) -> dict[str, float]:
    summary = {}
    for place, name in enumerate(("refused", "kl")):
        values = [one[place] for one in found]
        changes = [one[place] - other[place] for one, other in zip(found, former, strict=True)]
        summary[name] = statistics.fmean(values)
        summary[f"{name}_error"] = statistics.stdev(changes) / math.sqrt(len(changes))
    return summary


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a table of all scenarios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=300, help="searches of each scenario")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args(arguments)
    print("| search | truly refused, former rule | bounds | true KL, former rule | bounds |")
    print("|---|---|---|---|---|")
    figures = {}
    for scenario in SCENARIOS:
        found = figures[scenario.name] = simulate(scenario, options.draws)
        former, bounds = found["former"], found["bounds"]
        cells = (
            f"{100 * former['refused']:.2f} %",
            f"{100 * bounds['refused']:.2f} ± {100 * bounds['refused_error']:.2f} %",
            f"{former['kl']:.4f}",
            f"{bounds['kl']:.4f} ± {bounds['kl_error']:.4f}",
        )
        print(f"| {scenario.name} | {' | '.join(cells)} |", flush=True)
    if options.json is not None:
        write_figures(options.json, figures)


if __name__ == "__main__":
    main()
