"""The timed parts of `benchmarks.gpu`: each beside the lower bound by the device's ceilings."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import directions as solvers
from benchmarks import shapes
from benchmarks.measuring import Clock, Memory
from benchmarks.phases import Bench
from benchmarks.random_models import prompt_sets
from benchmarks.roofline import measured_ceilings
from job.config.load import default_values
from job.edits.hooks import Intervention
from job.generation.stop_markers import AnswerWatch, MarkerWatch
from job.gradient.descent import DescentState
from job.gradient.hooks import DifferentiableEdits
from job.gradient.problem import LossWeights, Problem
from job.gradient.recipe import Recipe
from job.model.device_faults import halving
from job.numerics.basis import Basis
from job.numerics.directions import contrastive_pca
from job.preflight.memory_plan import DevicePlan
from job.scoring.prompt_batches import PromptBatches
from job.scoring.refusals import RefusalCounter
from job.scoring.trial_scorer import TrialScorer
from job.text.refusal_markers import PhraseMatcher, RefusalMarkers


@dataclass(frozen=True)
class Amount:
    """How much is computed.

    Attributes:
        prompts: Prompts for directions; an eighth of them of either kind for a trial.
        tokens: Longest response.
        trials: Trials of a batch.
        residuals: Prompts of each kind, layers and width of the solver.
    """

    prompts: int
    tokens: int
    trials: int
    residuals: tuple[int, int, int]


AMOUNTS = {"cuda": Amount(800, 30, 8, (400, 64, 5120)), "cpu": Amount(16, 4, 2, (24, 3, 64))}


class Timed:
    """A shape's random model in bfloat16 with its bench, prompts, plan and directions."""

    def __init__(self, subject: Any) -> None:
        device = subject.device
        self.device, self.amount = device, AMOUNTS[device.type]
        self.sets = prompt_sets(self.amount.prompts)
        wanted = subject.shape_in(torch.bfloat16)
        self.longest = max(map(len, shapes.tokens_of(subject.tokenizer, self.sets)))
        self.plan = shapes.planned(wanted, shapes.reading_of(device), self.longest, self.amount.tokens)
        memory, clock = Memory(device), Clock(device)
        ceilings = measured_ceilings(wanted.facts, device, torch.bfloat16)
        self.loaded = subject.loaded(torch.bfloat16)
        self.bench = Bench(wanted, self.loaded, ceilings, clock, memory)
        self._basis: Basis | None = None

    @property
    def basis(self) -> Basis:
        """Directions of the random model, extracted on first use."""
        if self._basis is None:
            tokens = self.plan.rows * (self.longest + self.amount.tokens)
            self._basis = shapes.directions(self.bench, self.sets, self.plan.rows, tokens)
        return self._basis

    def figures(self, name: str) -> dict[str, Any]:
        """Return a phase's figures, without its forwards."""
        (found,) = [phase for phase in self.bench.phases if phase["phase"] == name][-1:]
        return {key: value for key, value in found.items() if key != "forwards"}


@cache
def timed(subject: Any) -> Timed:
    """Return the subject's model and bench, made on first use."""
    return Timed(subject)


def residuals(subject: Any) -> dict[str, Any]:
    """Extract residuals and take the mean difference."""
    model = timed(subject)
    assert model.basis.layers == model.loaded.architecture.layer_count
    found = {name: model.figures(name) for name in ("extraction", "mean difference")}
    took, share = found["extraction"]["seconds"], found["extraction"]["share"]
    prompts = f"{model.amount.prompts} prompts in {took:.2f} s"
    return {"phases": found, "rows": model.plan.rows, "summary": f"{prompts}, {share:.0%} of the roofline"}


@contextmanager
def forward_times(model: nn.Module, device: torch.device) -> Iterator[dict[str, float]]:
    """Yield a dictionary that has the device's seconds in forwards of several tokens and of one, after the block."""
    marks: list[tuple[int, Any, Any]] = []
    found: dict[str, float] = {}

    def mark() -> Any:
        if device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def begin(_module: nn.Module, _inputs: Any, named: dict[str, Any]) -> None:
        marks.append((named["input_ids"].shape[1], mark(), None))

    def end(*_: Any) -> None:
        tokens, begun, _ = marks.pop()
        marks.append((tokens, begun, mark()))

    handles = [model.register_forward_pre_hook(begin, with_kwargs=True), model.register_forward_hook(end)]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    for name, several in (("prefill", True), ("decoding", False)):
        chosen = [(begun, ended) for tokens, begun, ended in marks if (tokens > 1) == several]
        found[name] = sum(
            begun.elapsed_time(ended) / 1000 if device.type == "cuda" else ended - begun for begun, ended in chosen
        )


class TimedWatch(MarkerWatch):
    """Watches responses, and keeps the seconds that it takes."""

    seconds = 0.0

    def begin(self, prompt: str) -> AnswerWatch:
        """Return a watch for one response to a prompt."""
        return _TimedAnswerWatch(self, self.markers.for_prompt(prompt))


class _TimedAnswerWatch(AnswerWatch):
    def __init__(self, watch: TimedWatch, markers: PhraseMatcher) -> None:
        super().__init__(watch, markers)
        self._timed = watch

    def found(self, tokens: Sequence[int]) -> bool:
        begun = time.perf_counter()
        found = super().found(tokens)
        self._timed.seconds += time.perf_counter() - begun
        return found


def trials(subject: Any) -> dict[str, Any]:
    """Evaluate a batch of trials as the search does, and tell its parts apart."""
    model = timed(subject)
    loaded, bench, count, rows = model.loaded, model.bench, model.amount.trials, model.plan.rows
    markers = RefusalMarkers(default_values()["scoring"]["refusal_markers"])
    batches = PromptBatches.of(loaded, model.sets["good_test"], model.sets["bad_test"], rows, report=print)
    scorer = TrialScorer.measured(batches, markers, model.amount.tokens)
    watch = TimedWatch(loaded.tokenizer, markers)
    scorer = replace(scorer, counter=replace(scorer.counter, watch=watch))
    edits = shapes.some_edits(loaded, 2 * count)
    with Intervention(loaded.model, loaded.architecture, model.basis, "none") as hooks:
        scorer.scores(hooks, edits[:count], rows)  # the first forwards load libraries
        work = partial(scorer.scores, hooks, edits[count:], rows)
        watch.seconds = 0.0
        with forward_times(loaded.model, model.device) as edited:
            scores = bench.phase("a batch of trials", work)
        matching = watch.seconds
        again = work()
        with forward_times(loaded.model, model.device) as plain:
            unedited(scorer, count, rows)
    figures = model.figures("a batch of trials")
    parts = {
        **{name: seconds / count for name, seconds in plain.items()},
        "hooks": (sum(edited.values()) - sum(plain.values())) / count,
        "matching": matching / count,
        "host": (figures["wall_s"] - sum(edited.values()) - matching) / count,
    }
    trial = figures["wall_s"] / count
    shown = ", ".join(f"{name} {seconds:.3f}" for name, seconds in parts.items())
    memory = memory_of(model, figures)
    return {
        **{"trial_s": trial, "parts_s": parts, "phase": figures, "rows": rows, "memory": memory},
        "repeatable": scores == again,
        "summary": f"{trial:.3f} s a trial, {figures['share']:.0%} of the roofline ({shown}); peak "
        f"{memory['peak_of_plan']:.0%} of the plan; a second time {'the same' if scores == again else 'OTHER SCORES'}",
    }


def unedited(scorer: TrialScorer, count: int, rows: int) -> None:
    """Run a batch of trials' forwards without edits."""
    batches, counter = scorer.batches, scorer.counter
    trial_rows = batches.trial_rows(None, count)
    scorer.reference.trial_means(batches, trial_rows, rows)
    assert isinstance(counter, RefusalCounter)
    counter.count(trial_rows, range(count), rows)


def memory_of(model: Timed, figures: dict[str, Any]) -> dict[str, Any]:
    """Return the planned memory of the device beside the measured peak, bytes."""
    planned: DevicePlan = model.plan.devices[0]
    parts = {name: getattr(planned, name) for name in ("weights", "tables", "cache", "activations", "margin")}
    computed = sum(parts.values()) - parts["margin"]
    reserved = torch.cuda.max_memory_reserved(model.device) if model.device.type == "cuda" else None
    return {
        **{"planned": parts, "peak": figures["peak_bytes"], "reserved": reserved},
        "peak_of_plan": figures["peak_bytes"] / computed,
    }


def gradient(subject: Any) -> dict[str, Any]:
    """Take the gradient of a step of the search by gradient."""
    model = timed(subject)
    loaded, chance, recipe = model.loaded, random.Random(0), Recipe()

    def some(count: int) -> list[list[int]]:
        return [[chance.randrange(3, 1000) for _ in range(count)] for _ in range(recipe.batch)]

    tokens = [loaded.tokenize(model.sets[name] * recipe.batch)[: recipe.batch] for name in ("bad_train", "good_train")]
    edits = DifferentiableEdits(loaded, "none", recipe.largest)
    problem = Problem(
        loaded,
        edits,
        recipe,
        0,
        bad=tokens[0],
        refusals=some(recipe.refusal_tokens),
        good=tokens[1],
        answers=some(recipe.kl_tokens),
        maker=None,  # type: ignore[arg-type]  # of targets, which a first step has none of
    )
    state = DescentState.start(model.basis, recipe)
    weights = LossWeights(recipe.first_beta, recipe.sparsity)

    def step(rows: int) -> object:
        return problem.gradients(state.variables, 0, weights, rows)

    _, rows = halving(recipe.batch, step, print)
    model.bench.phase("a gradient step", partial(step, rows))
    figures = model.figures("a gradient step")
    return {"phase": figures, "rows": rows, "summary": f"{figures['wall_s']:.2f} s a step, {rows} prompts at a time"}


def switching(subject: Any) -> dict[str, Any]:
    """Time activating batches of edits in three norm modes."""
    model = timed(subject)
    found = shapes.switching(model.bench, model.basis, model.amount.trials)
    shown = ", ".join(f"{one['mode']} {one['ms_per_trial']:.2f}" for one in found)
    return {"modes": found, "summary": f"ms a trial: {shown}"}


def solver(subject: Any) -> dict[str, Any]:
    """Solve contrastive PCA of all layers; one layer is compared with the CPU."""
    count, layers, width = AMOUNTS[subject.device.type].residuals
    good, bad = solvers.residuals(layers, width, str(subject.device), count)
    contrastive_pca(good[:, :1], bad[:, :1])  # the first call loads libraries
    clock, results = Clock(subject.device), list[Any]()
    times = [clock.times(lambda: results.append(contrastive_pca(good, bad))) for _ in range(3)]
    expected = contrastive_pca(good[:, :1].cpu(), bad[:, :1].cpu()).directions[0]
    found: Tensor = results[0].directions[0].cpu()
    cosine = float((found * expected).sum(-1).abs().min())
    took = statistics.median(one.wall for one in times)
    return {
        **{"seconds_each": [one.wall for one in times], "least_cosine": cosine, "wrong": cosine < 0.999},
        "summary": f"{layers} × {width}, {count} + {count} prompts in {took:.2f} s; least cosine {cosine:.6f}",
    }


PARTS: dict[str, Callable[[Any], dict[str, Any]]] = {
    **{"residuals": residuals, "trials": trials, "gradient": gradient},
    **{"switching": switching, "solver": solver},
}
