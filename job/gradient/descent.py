"""The descent: stages with a growing KL weight, resumed exactly after any kill.

A stage minimises R + β D + ρ mean(λ): R is the refusal term, D the divergence from the base model
(`job.gradient.problem`). If every held-out prompt stays unanswered, β shrinks: where the model is sure of its
refusals, R has next to no gradient, and D would keep the edit at nothing. Otherwise β is constant for at least two
stages, until hardly any prompt is unanswered. Then it grows, so that edits weaken from stage to stage. The stages
before refusals return are the path. The descent also ends if the held-out KL no longer falls, as where the model's
number type is too coarse.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from job.directions.residuals import read_tensors, write_tensors
from job.edits.hooks import ActiveEdits
from job.errors import first_line
from job.gradient.problem import Evasions, Losses, LossWeights, Problem, Targets
from job.gradient.recipe import Recipe
from job.model.device_faults import halving
from job.numerics.basis import Basis, DirectionPath
from job.numerics.gradient import AdamState, EditVariables, adam_step
from job.records import TrialScores

# Steps between two writes of the state.
_KEPT_EVERY = 4
# Share of held-out prompts that may stay unanswered before β grows, and that a later stage may lose.
_TOLERANCE = 1 / 50
# Where prompts are left, but no more than this share, a stage that lowers neither it nor, by the least gain, the KL is
# the last.
_FEW, _LEAST_GAIN = 1 / 10, 1 / 5


@dataclass(frozen=True)
class StageEnd:
    """The end of a stage, with held-out scores."""

    variables: EditVariables
    beta: float
    steps: int
    scores: TrialScores


@dataclass(frozen=True)
class DescentState:
    """Complete state of the descent: edit, optimiser, finished stages and rows per forward."""

    variables: EditVariables
    adam: AdamState
    ends: tuple[StageEnd, ...]
    rows: int

    @classmethod
    def start(cls, basis: Basis, recipe: Recipe) -> DescentState:
        """Return the state before the first step: each layer's own directions, hardly ablated."""
        directions = basis.directions[None].to("cpu", torch.float64)
        logits = torch.full((1, 2, basis.layers, basis.size), recipe.start, dtype=torch.float64)
        variables = EditVariables(logits, directions)
        return cls(variables, AdamState.zero(variables), (), recipe.batch)

    def tensors(self) -> dict[str, Tensor]:
        """Return the exact state as tensors."""
        found = {}
        for name, value in (("now", self.variables), ("first", self.adam.first), ("second", self.adam.second)):
            found[f"{name}.logits"], found[f"{name}.directions"] = value.logits, value.directions
        figures = []
        for number, end in enumerate(self.ends):
            found[f"end{number}.logits"] = end.variables.logits
            found[f"end{number}.directions"] = end.variables.directions
            figures.append([end.beta, end.steps, end.scores.refusals, end.scores.broken, end.scores.kl])
        found["figures"] = torch.tensor(figures, dtype=torch.float64).reshape(len(figures), 5)
        found["counts"] = torch.tensor([self.adam.steps, self.rows])
        return {name: value.clone() for name, value in found.items()}  # the latest end is also the current edit

    @classmethod
    def of(cls, tensors: dict[str, Tensor]) -> DescentState:
        """Restore the state from tensors."""

        def variables(name: str) -> EditVariables:
            return EditVariables(tensors[f"{name}.logits"], tensors[f"{name}.directions"])

        ends = []
        for number, (beta, steps, refusals, broken, kl) in enumerate(tensors["figures"].tolist()):
            scores = TrialScores(refusals=int(refusals), broken=int(broken), kl=kl)
            ends.append(StageEnd(variables(f"end{number}"), beta, int(steps), scores))
        steps, rows = map(int, tensors["counts"].tolist())
        return cls(variables("now"), AdamState(variables("first"), variables("second"), steps), tuple(ends), rows)


class Descent:
    """Strengthens an edit of next to nothing until refusals are gone, then weakens it until they return."""

    def __init__(
        self,
        problem: Problem,
        measure: Callable[[EditVariables], TrialScores],
        activate: Callable[[EditVariables], ActiveEdits],
        held_out: int,
        file: Path,
        key: str,
        report: Callable[[str], None],
        room: Callable[[float], bool] = lambda _: True,
    ) -> None:
        """Prepare the descent.

        `measure` scores an edit on the `held_out` held-out bad prompts; `activate` activates one in the search's hooks.
        `file` holds the state, under the cache key `key`; `report` receives a line for every stage. `room` returns
        whether the budget allows another stage of a given number of seconds.
        """
        self._problem, self._recipe = problem, problem.recipe
        self._measure, self._activate, self._held_out = measure, activate, held_out
        self._file, self._key, self._report = file, key, report
        self._room = room
        self.cut_short = False
        self._evasions_of_ends: list[Sequence[list[int] | None]] = []

    def run(self, start: DescentState, advance: Callable[[int], None]) -> tuple[StageEnd, ...]:
        """Return the stages to keep; `advance` receives the number of steps done. Raises MachineError."""
        kept = read_tensors(self._file, self._key)
        state = start if kept is None else DescentState.of(kept)
        if kept is None:
            self._write_state(state)  # its rows, which depend on the memory that was free
        advance(state.adam.steps)
        longest = 0.0
        while not self._is_over(state.ends):
            if state.ends and not self._room(longest):
                self.cut_short = True
                self._report("the budget ends the gradient descent")
                break
            begin = time.monotonic()
            weights, pace = self._weights(state.ends), self._pace(state.ends)
            last = (len(state.ends) + 1) * self._recipe.steps
            targets, evasions = self._targets(state.ends), self._evasions(state.ends)
            losses = Losses(0.0, 0.0)
            while state.adam.steps < last:
                state, losses = self._step(state, weights, pace, targets, evasions)
                advance(1)
                if state.adam.steps % _KEPT_EVERY == 0:
                    self._write_state(state)
            scores = self._measure(state.variables)
            end = StageEnd(state.variables, weights.beta, state.adam.steps, scores)
            state = replace(state, ends=(*state.ends, end))
            self._write_state(state)
            self._report_stage(end, losses)
            longest = max(longest, time.monotonic() - begin)
        return worth_keeping(state.ends, self._held_out)

    def _targets(self, ends: Sequence[StageEnd]) -> Targets:
        """Return the next stage's targets, deterministically from the end of the last one."""
        if not self._recipe.target_weight or not self._beta_steps(ends):
            return ()
        targets = self._problem.maker.targets(self._activate(ends[-1].variables))
        usable = sum(target is not None for target in targets)
        self._report(f"targets: {usable} of {len(targets)} prompts with the behaviour have a response without it")
        return targets

    def _evasions(self, ends: Sequence[StageEnd]) -> Evasions:
        """Return first tokens of the responses that evaded at the ends of stages, deterministically from these."""
        maker, count = self._problem.maker, len(self._problem.bad)
        if not ends or not maker.markers.evasions:
            return ()
        known = self._evasions_of_ends
        known += [
            maker.evasions(self._activate(end.variables)) if end.scores.reason is None else [None] * count  # not finite
            for end in ends[len(known) :]
        ]
        found: list[dict[tuple[int, ...], None]] = [{} for _ in range(count)]
        for prompt, evasions in zip(found, zip(*known, strict=True), strict=True):
            prompt.update((tuple(said[: self._recipe.refusal_tokens]), None) for said in evasions if said is not None)
        evaded = sum(map(bool, found))
        if evaded:
            self._report(f"evasive responses to {evaded} of {count} prompts are to become unlikely as well")
        return [list(map(list, prompt)) for prompt in found]

    def _step(
        self, state: DescentState, weights: LossWeights, pace: float, targets: Targets, evasions: Evasions
    ) -> tuple[DescentState, Losses]:
        (gradients, losses), rows = halving(
            state.rows,
            lambda rows: self._problem.gradients(state.variables, state.adam.steps, weights, rows, targets, evasions),
            self._report,
        )
        state = replace(state, rows=rows)
        rate, turn = pace * self._recipe.rate, pace * self._recipe.turn
        variables, adam = adam_step(state.variables, gradients, state.adam, rate, turn)
        return replace(state, variables=variables, adam=adam), losses

    def _beta_steps(self, ends: Sequence[StageEnd]) -> int:
        """Return how often β has grown."""
        return sum(_is_complete(end, self._held_out) for end in ends[self._recipe.first_stages - 1 :])

    def _weights(self, ends: Sequence[StageEnd]) -> LossWeights:
        grown, recipe = self._beta_steps(ends), self._recipe
        stuck = sum(end.scores.unanswered == self._held_out for end in ends)
        beta = recipe.first_beta * recipe.factor ** (grown - stuck)
        return LossWeights(beta, recipe.sparsity_after if grown else recipe.sparsity)

    def _pace(self, ends: Sequence[StageEnd]) -> float:
        return self._recipe.decay ** self._beta_steps(ends)

    def _is_over(self, ends: Sequence[StageEnd]) -> bool:
        kls = [end.scores.kl for end in ends if _is_complete(end, self._held_out)]
        falls = len(kls) < 2 or kls[-1] < min(kls[:-1])
        over = len(ends) >= self._recipe.stages or len(worth_keeping(ends, self._held_out)) < len(ends)
        return over or (not falls and self._beta_steps(ends[:-1]) > 0) or self._has_stalled(ends)

    def _has_stalled(self, ends: Sequence[StageEnd]) -> bool:
        """Return whether the last stage gained next to nothing, where few prompts are left that β waits for."""
        if len(ends) <= self._recipe.first_stages or _is_complete(ends[-1], self._held_out):
            return False
        before, last = ends[-2].scores, ends[-1].scores
        few = max(before.unanswered, last.unanswered) <= _FEW * self._held_out
        return few and last.unanswered >= before.unanswered and last.kl > (1 - _LEAST_GAIN) * before.kl

    def _write_state(self, state: DescentState) -> None:
        write_tensors(self._file, self._key, state.tensors())

    def _report_stage(self, end: StageEnd, losses: Losses) -> None:
        scores = end.scores
        self._report(
            f"gradient step {end.steps}: beta {end.beta:g}, R {losses.refusal:.3g}, D {losses.divergence:.3g}; "
            f"held out: {scores.refusals}/{self._held_out} with the behaviour, {scores.broken} broken responses, "
            f"KL {scores.kl:.4g}"
        )


def _is_complete(end: StageEnd, held_out: int) -> bool:
    return end.scores.reason is None and end.scores.unanswered <= _TOLERANCE * held_out


def worth_keeping(ends: Sequence[StageEnd], held_out: int) -> tuple[StageEnd, ...]:
    """Return the stages before held-out refusals or broken responses returned."""
    for number, end in enumerate(ends[1:], 1):
        was_complete = any(_is_complete(before, held_out) for before in ends[:number])
        if was_complete and not _is_complete(end, held_out):
            return tuple(ends[:number])
    return tuple(ends)


def path_of(ends: Sequence[StageEnd]) -> DirectionPath:
    """Return the stages' directions as a path."""
    return DirectionPath(torch.cat([end.variables.orthonormal() for end in ends]).to(torch.float32))


# What models whose forward has no gradient raise.
NO_GRADIENT = (RuntimeError, NotImplementedError, TypeError)
# Steps of θ along the gradient for finite differences: smaller ones vanish in 16-bit rounding.
_PROBES = (0.02, 0.1, 0.5)
_PROBE_SHARE = 0.25
# Prompts of each kind that they are computed on.
_PROBE_PROMPTS = 8


def gradient_fault(
    problem: Problem, start: DescentState, weights: LossWeights, report: Callable[[str], None]
) -> str | None:
    """Check gradients against finite differences; return the fault, or None. Raises MachineError."""
    # At a start with hardly any edit, the difference would be too small.
    variables = EditVariables(torch.full_like(start.variables.logits, -1.0), start.variables.directions)
    few = min(problem.recipe.batch, _PROBE_PROMPTS)
    problem = replace(problem, recipe=replace(problem.recipe, batch=few))
    try:
        (gradients, _), rows = halving(start.rows, lambda rows: problem.gradients(variables, 0, weights, rows), report)
    except NO_GRADIENT as error:
        return f"it has no gradient: {first_line(error)}"
    slope = float(gradients.logits.norm())
    if not bool(gradients.logits.isfinite().all() and gradients.directions.isfinite().all()):
        return "they are not finite"
    if slope == 0:
        return "they are zero"
    along = gradients.logits / slope
    found = []
    for step in _PROBES:
        ahead, behind = (
            problem.loss(EditVariables(variables.logits + sign * step * along, variables.directions), 0, weights, rows)
            for sign in (1, -1)
        )
        found.append((ahead - behind) / (2 * step))
        if abs(found[-1] - slope) <= _PROBE_SHARE * slope:
            return None
    return f"they give a slope of {slope:.3g} where finite differences give {', '.join(f'{one:.3g}' for one in found)}"
