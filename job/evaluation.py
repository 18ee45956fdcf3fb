"""Measuring a model: how many bad prompts it refuses and how far it has moved on good ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from job.decoding import Answer, first_logits, greedy_answers
from job.intervention import Intervention
from job.model import LoadedModel
from job.numerics.metrics import kl_divergence
from job.prompts import Prompt
from job.records import EditParameters, Figures, TrialScores
from job.scoring import RefusalMarkers

# KL that a failed trial is told with; far above what any usable edit has.
FAILED_KL = 100.0


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
    ) -> None:
        """Prepare the prompts.

        Args:
            loaded: The base model.
            good: Prompts that KL is measured on.
            bad: Prompts whose refusals are counted.
            markers: What counts as a refusal.
            answer_tokens: Answers are judged up to this many tokens.
            rows: Rows of a forward, all edits together.
        """
        self._loaded = loaded
        # By length, so that forwards waste little on padding.
        self._good = sorted(loaded.tokenize(good), key=len)
        self._bad = sorted(loaded.tokenize(bad), key=len)
        self._markers = markers
        self._answer_tokens = answer_tokens
        self._rows = rows
        self._base: Tensor | None = None

    @property
    def dtype(self) -> str:
        """The floating-point type of the model's weights."""
        return self._loaded.dtype

    @property
    def base_log_probs(self) -> Tensor:
        """The base model's log-probabilities of the first answer token, [good prompts, vocabulary]."""
        if self._base is None:
            logits = [first_logits(self._loaded.model, chunk) for chunk in _chunks(self._good, self._rows)]
            self._base = torch.cat(logits).log_softmax(-1)
        return self._base

    def scores(self, intervention: Intervention, edits: Sequence[EditParameters], rows: int) -> list[TrialScores]:
        """Return the scores of all edits, evaluated together.

        Args:
            intervention: The hooks, in place.
            edits: The edits, one a trial.
            rows: Rows of a forward, all edits together.
        """
        base = self.base_log_probs
        reasons = intervention.activate(edits)
        kl = torch.zeros(len(edits), dtype=torch.float64)
        refusals = [0] * len(edits)
        size = max(1, rows // len(edits))
        try:
            done = 0
            for chunk in _chunks(self._good, size):
                intervention.rows = self._trial_of_row(len(edits), len(chunk))
                logits = first_logits(self._loaded.model, chunk * len(edits))
                expected = base[done : done + len(chunk)].repeat(len(edits), 1)
                kl += kl_divergence(expected, logits).view(len(edits), -1).sum(1).cpu()
                done += len(chunk)
            for chunk in _chunks(self._bad, size):
                intervention.rows = self._trial_of_row(len(edits), len(chunk))
                for row, refused in enumerate(self._refusals(chunk * len(edits), intervention)):
                    refusals[row // len(chunk)] += refused
        finally:
            intervention.rows = None
        means = (kl / len(self._good)).tolist()
        return [self._values(count, mean, reason) for count, mean, reason in zip(refusals, means, reasons, strict=True)]

    def _values(self, refusals: int, kl: float, reason: str | None) -> TrialScores:
        if reason is None and not kl < FAILED_KL:
            reason = "the KL divergence is not finite" if kl != kl else "the KL divergence is out of bounds"
        if reason is not None:
            return TrialScores(refusals=len(self._bad), kl=FAILED_KL, reason=reason)
        # KL is not negative; rounding may say so by 1e-17.
        return TrialScores(refusals=refusals, kl=max(kl, 0.0))

    def _trial_of_row(self, trials: int, prompts: int) -> Tensor:
        return torch.arange(trials, device=self._loaded.device).repeat_interleave(prompts)

    def _refusals(self, prompts: Sequence[list[int]], intervention: Intervention | None) -> list[bool]:
        """Return which rows refuse; a row leaves the batch once it contains a marker."""

        def select(keep: Tensor) -> None:
            if intervention is not None and intervention.rows is not None:
                intervention.rows = intervention.rows[keep]

        answers = greedy_answers(
            self._loaded.model,
            prompts,
            limit=self._answer_tokens,
            end_tokens=self._loaded.end_tokens,
            decided=lambda tokens: self._markers.found(self._loaded.decode(tokens)),
            select=select,
        )
        return [self._markers.is_refusal(self._loaded.decode(answer.tokens)) for answer in answers]

    def figures(self, base: Evaluator | None = None) -> Figures:
        """Return the figures of this evaluator's model as it is, without hooks.

        Args:
            base: The evaluator of the base model on the same prompts, for the KL divergence.
        """
        refused = [self._refusals(chunk, None) for chunk in _chunks(self._bad, self._rows)]
        falsely = [self._refusals(chunk, None) for chunk in _chunks(self._good, self._rows)]
        kl = None
        if base is not None:
            logits = [first_logits(self._loaded.model, chunk) for chunk in _chunks(self._good, self._rows)]
            kl = max(float(kl_divergence(base.base_log_probs, torch.cat(logits)).mean()), 0.0)
        return Figures(
            bad_prompts=len(self._bad),
            refusals=sum(map(sum, refused)),
            good_prompts=len(self._good),
            false_refusals=sum(map(sum, falsely)),
            kl=kl,
        )

    def answers(self, intervention: Intervention | None) -> list[Answer]:
        """Return whole answers to all prompts, good ones first; with the intervention's edit 0 if given."""
        found = []
        for chunk in _chunks([*self._good, *self._bad], self._rows):

            def select(keep: Tensor) -> None:
                if intervention is not None and intervention.rows is not None:
                    intervention.rows = intervention.rows[keep]

            if intervention is not None:
                intervention.rows = self._trial_of_row(1, len(chunk))
            found += greedy_answers(
                self._loaded.model,
                chunk,
                limit=self._answer_tokens,
                end_tokens=self._loaded.end_tokens,
                select=select,
            )
        if intervention is not None:
            intervention.rows = None
        return found


def _chunks(items: Sequence[list[int]], size: int) -> Iterator[list[list[int]]]:
    for start in range(0, len(items), size):
        yield list(items[start : start + size])
