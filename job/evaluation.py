"""Measuring a model: how many bad prompts it refuses and how far it has moved on good ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from job.caches import common_prefix, longest_shared_prefix
from job.decoding import Answer, Shared, first_logits, greedy_answers, shared_prefix
from job.faults import halving
from job.intervention import Intervention
from job.model import LoadedModel
from job.numerics.intervals import mean_interval
from job.numerics.metrics import kl_divergence
from job.prompts import Prompt
from job.records import EditParameters, Figures, TrialScores
from job.scoring import RefusalMarkers, is_degenerate
from job.streaming import MarkerWatch

T = TypeVar("T")
# KL that a failed trial is told with; far above what any usable edit has.
FAILED_KL = 100.0
# A shorter prefix saves less than the forward that computes it once takes (measured, docs/lab-notes.md).
LEAST_PREFIX = 2


class Evaluator:
    """Scores edits on one pair of good and bad prompt sets, many edits in one batch."""

    def __init__(
        self,
        loaded: LoadedModel,
        good: Sequence[Prompt],
        bad: Sequence[Prompt],
        *,
        markers: RefusalMarkers,
        answer_tokens: int,
        rows: int,
        report: Callable[[str], None] = lambda _: None,
        least_prefix: int = LEAST_PREFIX,
    ) -> None:
        """Prepare the prompts.

        Args:
            loaded: The base model.
            good: Prompts that KL is measured on.
            bad: Prompts whose refusals are counted.
            markers: What counts as a refusal.
            answer_tokens: Answers are judged up to this many tokens.
            rows: Rows of a forward, all edits together.
            report: Told where memory does not suffice for so many rows.
            least_prefix: Tokens that all prompts must begin with to be computed once for each trial.
        """
        self._loaded = loaded
        self._report = report
        # By length, so that forwards waste little on padding.
        self._good = sorted(loaded.tokenize(good), key=len)
        self._bad = sorted(loaded.tokenize(bad), key=len)
        common = common_prefix([*self._good, *self._bad])[: longest_shared_prefix(loaded.model)]
        self._prefix = common if len(common) >= least_prefix else []
        self._markers = markers
        self._watch = MarkerWatch(loaded.tokenizer, markers)
        self._answer_tokens = answer_tokens
        self._rows = rows
        self._base: Tensor | None = None
        self._base_openings: list[int] | None = None

    @property
    def dtype(self) -> str:
        """The floating-point type of the model's weights."""
        return self._loaded.dtype

    @property
    def base_log_probs(self) -> Tensor:
        """The base model's log-probabilities of the first answer token, [good prompts, vocabulary]."""
        if self._base is None:
            self._base = self._fitting(lambda: self._first_logits(None)).log_softmax(-1)
        return self._base

    @property
    def base_openings(self) -> list[int]:
        """The token that opens the base model's answer to each bad prompt."""
        if self._base_openings is None:
            self._base_openings = self._fitting(
                lambda: [
                    token
                    for chunk, shared in self._placed(self._bad, None)
                    for token in first_logits(self._loaded.model, chunk, shared).argmax(-1).tolist()
                ]
            )
        return self._base_openings

    def _fitting(self, compute: Callable[[], T]) -> T:
        """Return what compute returns, with fewer rows a forward from now on where memory does not suffice."""

        def with_rows(rows: int) -> T:
            self._rows = rows
            return compute()

        return halving(self._rows, with_rows, self._report)[0]

    def _first_logits(self, intervention: Intervention | None) -> Tensor:
        """Return the logits of the first answer token to all good prompts."""
        placed = self._placed(self._good, intervention)
        return torch.cat([first_logits(self._loaded.model, chunk, shared) for chunk, shared in placed])

    def scores(self, intervention: Intervention, edits: Sequence[EditParameters], rows: int) -> list[TrialScores]:
        """Return the scores of all edits, evaluated together.

        Args:
            intervention: The hooks, in place.
            edits: The edits, one a trial.
            rows: Rows of a forward, all edits together.
        """
        base, openings = self.base_log_probs, self.base_openings
        reasons = intervention.activate(edits)
        kl = torch.zeros(len(edits), dtype=torch.float64)
        refusals = [0] * len(edits)
        odds = [0.0] * len(edits)
        size = max(1, rows // len(edits))
        try:
            done = 0
            on_prefix = self._on_prefix(intervention, len(edits))
            for chunk in _chunks(self._good, size):
                intervention.rows = self._trial_of_row(len(edits), len(chunk))
                shared = on_prefix(intervention.rows)
                logits = first_logits(self._loaded.model, chunk * len(edits), shared)
                expected = base[done : done + len(chunk)].repeat(len(edits), 1)
                kl += kl_divergence(expected, logits).view(len(edits), -1).sum(1).cpu()
                done += len(chunk)
            done = 0
            for chunk in _chunks(self._bad, size):
                intervention.rows = self._trial_of_row(len(edits), len(chunk))
                asked = openings[done : done + len(chunk)]
                shared = on_prefix(intervention.rows)
                answers = self._answers(chunk * len(edits), intervention, asked * len(edits), shared=shared)
                for row, answer in enumerate(answers):
                    refusals[row // len(chunk)] += self._is_refusal(answer)
                    odds[row // len(chunk)] += answer.opening / len(self._bad)
                done += len(chunk)
        finally:
            intervention.rows = None
        means = (kl / len(self._good)).tolist()
        return [self._values(*measured) for measured in zip(refusals, means, odds, reasons, strict=True)]

    def _values(self, refusals: int, kl: float, opening: float, reason: str | None) -> TrialScores:
        if reason is None and not (math.isfinite(kl) and math.isfinite(opening)):
            reason = "the logits are not finite"
        if reason is None and kl >= FAILED_KL:
            reason = f"the KL divergence is {kl:.3g} nats"
        if reason is not None:
            return TrialScores(refusals=len(self._bad), kl=FAILED_KL, reason=reason)
        # KL is not negative; rounding may say so by 1e-17.
        return TrialScores(refusals=refusals, kl=max(kl, 0.0), opening=opening)

    def _trial_of_row(self, trials: int, prompts: int) -> Tensor:
        return torch.arange(trials, device=self._loaded.device).repeat_interleave(prompts)

    def _on_prefix(self, intervention: Intervention | None, trials: int) -> Callable[[Tensor], Shared | None]:
        """Compute what all prompts begin with, for every trial; return what gives each row its trial's share of it."""
        if not self._prefix:
            return lambda _: None
        if intervention is not None:
            intervention.rows = self._trial_of_row(trials, 1)
        prefix = shared_prefix(self._loaded.model, self._prefix, trials)
        return lambda rows: Shared(prefix, rows)

    def _answers(
        self,
        prompts: Sequence[list[int]],
        intervention: Intervention | None,
        openings: Sequence[int] | None = None,
        *,
        shared: Shared | None = None,
        whole: bool = False,
    ) -> list[Answer]:
        """Return answers; unless they are wanted whole, a row leaves the batch once it contains a marker."""

        def select(keep: Tensor) -> None:
            if intervention is not None and intervention.rows is not None:
                intervention.rows = intervention.rows[keep]

        watches = [self._watch.begin() for _ in prompts]

        def decided(index: int, tokens: list[int]) -> bool:
            return watches[index].found(tokens)

        return greedy_answers(
            self._loaded.model,
            prompts,
            limit=self._answer_tokens,
            end_tokens=self._loaded.end_tokens,
            openings=openings,
            decided=None if whole else decided,
            select=select,
            shared=shared,
        )

    def _is_refusal(self, answer: Answer) -> bool:
        return self._markers.is_refusal(self._loaded.decode(answer.tokens))

    def figures(self, base: Evaluator | None = None, intervention: Intervention | None = None) -> Figures:
        """Return the figures of this evaluator's model as it is or, if given, with the intervention's edit 0.

        Args:
            base: The evaluator of the base model on the same prompts, for the KL divergence.
            intervention: Hooks, in place.
        """
        answers = [self._loaded.decode(answer.tokens) for answer in self.answers(intervention)]
        good, bad = answers[: len(self._good)], answers[len(self._good) :]
        kl = self._kl(base, intervention) if base is not None else None
        return Figures(
            bad_prompts=len(bad),
            refusals=sum(map(self._markers.is_refusal, bad)),
            good_prompts=len(good),
            false_refusals=sum(map(self._markers.is_refusal, good)),
            degenerate=sum(map(is_degenerate, bad)),
            false_degenerate=sum(map(is_degenerate, good)),
            kl=math.fsum(kl) / len(kl) if kl is not None else None,
            kl_interval=mean_interval(kl) if kl is not None else None,
        )

    def _kl(self, base: Evaluator, intervention: Intervention | None) -> list[float]:
        """Return the KL divergence from another evaluator's base model for every good prompt."""
        expected = base.base_log_probs
        logits = self._fitting(lambda: self._first_logits(intervention))
        # KL is not negative; rounding may say so by 1e-17.
        return [max(kl, 0.0) for kl in kl_divergence(expected, logits).tolist()]

    def answers(self, intervention: Intervention | None) -> list[Answer]:
        """Return whole answers to all prompts, good ones first; with the intervention's edit 0 if given."""

        def answered() -> list[Answer]:
            placed = self._placed([*self._good, *self._bad], intervention)
            return [
                answer
                for chunk, shared in placed
                for answer in self._answers(chunk, intervention, shared=shared, whole=True)
            ]

        return self._fitting(answered)

    def _placed(
        self, prompts: Sequence[list[int]], intervention: Intervention | None
    ) -> Iterator[tuple[list[list[int]], Shared | None]]:
        """Yield the prompts in chunks, all rows of which have the intervention's edit 0, on what they begin with."""
        try:
            on_prefix = self._on_prefix(intervention, 1)
            for chunk in _chunks(prompts, self._rows):
                rows = torch.zeros(len(chunk), dtype=torch.long, device=self._loaded.device)
                if intervention is not None:
                    intervention.rows = rows
                yield chunk, on_prefix(rows)
        finally:
            if intervention is not None:
                intervention.rows = None


def _chunks(items: Sequence[list[int]], size: int) -> Iterator[list[list[int]]]:
    for start in range(0, len(items), size):
        yield list(items[start : start + size])
