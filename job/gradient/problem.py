"""The descent's objective: prompts with responses to suppress and responses to keep."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Self, TypeVar

import torch
from torch import Tensor
from torch.autograd import backward
from torch.nn.utils.rnn import pad_sequence

from job.data.prompts import Prompt
from job.generation.answer import Answer
from job.gradient.hooks import DifferentiableEdits
from job.gradient.reading import ForcedAnswers, answer_logits, head_inputs
from job.gradient.recipe import Recipe
from job.gradient.targets import TargetMaker, refusal_only
from job.model.loading import LoadedModel
from job.numerics.gradient import (
    EditVariables,
    answer_divergence,
    minibatch,
    refusal_term,
    sequence_log_probabilities,
)
from job.scoring.likelihood import IncoherenceTest
from job.scoring.prompt_batches import PromptBatches
from job.text.refusal_markers import RefusalMarkers

T = TypeVar("T")

# A target or None for every bad prompt of a problem.
Targets = Sequence[list[int] | None]
# For every bad prompt of a problem, first tokens of evasive responses.
Evasions = Sequence[Sequence[list[int]]]


@dataclass(frozen=True)
class LossWeights:
    """Weights of the KL divergence (`beta`) and of the mean strength in a stage's loss."""

    beta: float
    sparsity: float


@dataclass(frozen=True)
class Losses:
    """Unweighted terms of a step's loss; see `job.numerics.gradient`."""

    refusal: float
    divergence: float


@dataclass(frozen=True)
class Problem:
    """Prompts to fit, as token ids, with the base model's responses.

    Attributes:
        bad: Bad prompts that the base model refuses.
        refusals: First tokens of these refusals.
        answers: First tokens of the base model's responses to them, the end token included.
        shared: First tokens of all prompts that are read once for all of them.
    """

    loaded: LoadedModel
    edits: DifferentiableEdits
    recipe: Recipe
    seed: int
    bad: Sequence[list[int]]
    refusals: Sequence[list[int]]
    good: Sequence[list[int]]
    answers: Sequence[list[int]]
    maker: TargetMaker
    shared: int = 0
    _kept_inputs: dict[int, Tensor | None] = field(default_factory=dict, repr=False)

    @classmethod
    def measured(
        cls,
        loaded: LoadedModel,
        edits: DifferentiableEdits,
        recipe: Recipe,
        seed: int,
        prompts: tuple[Sequence[Prompt], Sequence[Prompt]],
        markers: RefusalMarkers,
        response_tokens: int,
        rows: int,
        incoherence_margin: float | None,
    ) -> Self:
        """Generate the base model's responses; hooks must be inactive.

        `prompts` are good and bad ones. Refusal markers are searched in the first `response_tokens` tokens.
        `incoherence_margin` is that of `IncoherenceTest.calibrated`, for targets.
        """
        batches = PromptBatches.of(loaded, *prompts, rows)

        def answered(tokens: Sequence[list[int]]) -> list[Answer]:
            return batches.row_limit.fit(lambda most: batches.responses(tokens, response_tokens, most))

        said = [answer.tokens for answer in answered(batches.bad.tokens)]
        good = answered(batches.good.tokens)
        refused = [
            index
            for index, (prompt, answer) in enumerate(zip(batches.bad.prompts, said, strict=True))
            if answer and markers.for_prompt(prompt.user).is_refusal(loaded.decode(answer))
        ]
        end = sorted(loaded.end_tokens)[:1] or [0]  # only the position that leads to it counts, not which one it is
        own = [(answer.tokens + end)[: recipe.kl_tokens] for answer in good]
        coherence = IncoherenceTest.calibrated(batches, incoherence_margin, good)
        only = refusal_only([said[index] for index in refused], [answer.tokens for answer in good])
        return cls(
            loaded,
            edits,
            recipe,
            seed,
            bad=[batches.bad.tokens[index] for index in refused],
            refusals=[said[index][: recipe.refusal_tokens] for index in refused],
            good=batches.good.tokens,
            answers=own,
            maker=TargetMaker(batches, refused, only, markers, coherence, response_tokens),
            shared=len(batches.prefix),
        )

    def gradients(
        self,
        variables: EditVariables,
        step: int,
        weights: LossWeights,
        rows: int,
        targets: Targets = (),
        evasions: Evasions = (),
    ) -> tuple[EditVariables, Losses]:
        """Return the gradients and terms of a step's loss; `targets` has a target or None per bad prompt.

        Where there are `evasions` of a prompt, they are to become as unlikely as its refusal.
        """
        watched = variables.with_gradients()
        bad, good = (
            minibatch(self.seed, step, name, len(prompts), self.recipe.batch)
            for name, prompts in (("bad", self.bad), ("good", self.good))
        )
        refusal = divergence = 0.0
        with_target = [index for index in bad if targets and targets[index]]
        share = self.recipe.refusal_weight if with_target else 1.0
        unwanted = [(index, self.refusals[index]) for index in bad]
        unwanted += [(index, opening) for index in bad if evasions for opening in evasions[index]]
        for openings in _parts(unwanted, rows):
            terms = self._refusal_terms(watched, openings)
            backward(share * terms.sum() / len(bad))
            refusal += float(terms.detach().sum()) / len(bad)
        for part in _parts(with_target, rows):
            terms = self._target_terms(watched, part, targets)
            backward(self.recipe.target_weight * terms.sum() / len(bad))
        for part in _parts(good, rows):
            terms = self._divergences(watched, part)
            backward(weights.beta * terms.sum() / len(good))
            divergence += float(terms.detach().sum()) / len(good)
        backward(weights.sparsity * watched.strengths(self.recipe.largest).mean())
        return watched.gradients(), Losses(refusal, divergence)

    @property
    def longest(self) -> int:
        """Return the tokens of the longest row that `read_longest` reads."""
        pairs = (*zip(self.bad, self.refusals, strict=True), *zip(self.good, self.answers, strict=True))
        return max(len(prompt) + len(answer) - 1 for prompt, answer in pairs)

    def read_longest(self, variables: EditVariables) -> None:
        """Compute gradients of the longest prompts, one row a forward: a step's memory per row."""
        watched = variables.with_gradients()
        bad, good = (
            max(range(len(prompts)), key=lambda index: len(prompts[index]) + len(answers[index]))
            for prompts, answers in ((self.bad, self.refusals), (self.good, self.answers))
        )
        backward(self._refusal_terms(watched, [(bad, self.refusals[bad])]).sum())
        backward(self._divergences(watched, [good]).sum())

    @torch.no_grad()
    def loss(self, variables: EditVariables, step: int, weights: LossWeights, rows: int) -> float:
        """Return a step's loss."""
        total = weights.sparsity * float(variables.strengths(self.recipe.largest).mean())
        bad, good = (
            minibatch(self.seed, step, name, len(prompts), self.recipe.batch)
            for name, prompts in (("bad", self.bad), ("good", self.good))
        )
        for openings in _parts([(index, self.refusals[index]) for index in bad], rows):
            total += float(self._refusal_terms(variables, openings).sum()) / len(bad)
        for part in _parts(good, rows):
            total += weights.beta * float(self._divergences(variables, part).sum()) / len(good)
        return total

    def _refusal_terms(self, variables: EditVariables, chosen: Sequence[tuple[int, list[int]]]) -> Tensor:
        """Return the terms of first tokens that are to become unlikely, each with its bad prompt's index, [n]."""
        prompts = [self.bad[index] for index, _ in chosen]
        forced = ForcedAnswers.of(prompts, [opening for _, opening in chosen], self.loaded.device, self.shared)
        with self.edits.applied(variables, [0] * len(chosen)):
            logits = answer_logits(self.loaded.model, forced)
        return refusal_term(sequence_log_probabilities(logits, forced.answers, forced.real), self.recipe.margin)

    def _target_terms(self, variables: EditVariables, chosen: Sequence[int], targets: Targets) -> Tensor:
        """Return the mean negative log-likelihood of each target's tokens, nats, [n]."""
        wanted = [target or [] for target in targets]
        forced = self._forced(self.bad, wanted, chosen)
        with self.edits.applied(variables, [0] * len(chosen)):
            logits = answer_logits(self.loaded.model, forced)
        together = sequence_log_probabilities(logits, forced.answers, forced.real)
        return -together / forced.real.sum(-1)

    def _divergences(self, variables: EditVariables, chosen: Sequence[int]) -> Tensor:
        model, forced = self.loaded.model, self._forced(self.good, self.answers, chosen)
        known = self._base_inputs(chosen)
        if known is None:
            with torch.no_grad():
                base = answer_logits(model, forced)
            with self.edits.applied(variables, [0] * len(chosen)):
                logits = answer_logits(model, forced)
        else:
            with self.edits.applied(variables, [0] * len(chosen)):
                both = answer_logits(model, forced, known)
            logits, base = both[: len(chosen)], both[len(chosen) :]
        return answer_divergence(base.detach(), logits, forced.real)

    def _base_inputs(self, chosen: Sequence[int]) -> Tensor | None:
        """Return what the base model's head reads to predict its responses, [n, a, d], None if that cannot be kept.

        A prompt is read once, when it is first drawn, and alone, so that no batch shows in what is kept. Logits would
        fill the memory if the vocabulary is large.
        """
        for index in (index for index in chosen if index not in self._kept_inputs):
            found = head_inputs(self.loaded.model, self._forced(self.good, self.answers, [index]))
            self._kept_inputs[index] = None if found is None else found[0]
        inputs = [kept for index in chosen if (kept := self._kept_inputs[index]) is not None]
        return pad_sequence(inputs, batch_first=True) if len(inputs) == len(chosen) else None

    def _forced(
        self, prompts: Sequence[list[int]], answers: Sequence[list[int]], chosen: Sequence[int]
    ) -> ForcedAnswers:
        asked, forced = ([values[index] for index in chosen] for values in (prompts, answers))
        return ForcedAnswers.of(asked, forced, self.loaded.device, self.shared)


def _parts(chosen: Sequence[T], rows: int) -> list[Sequence[T]]:
    return [chosen[begin : begin + rows] for begin in range(0, len(chosen), rows)]
