"""Counting refusals and broken responses of many trials in one batch, with early stopping."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Self

from job.generation.answer import Answer
from job.generation.finite import require_finite
from job.generation.forward import RowTrials, first_logits
from job.generation.stop_markers import MarkerWatch
from job.scoring.broken import is_broken
from job.scoring.prompt_batches import PromptBatches, TrialRows
from job.text.refusal_markers import RefusalMarkers


@dataclass
class ResponseCounts:
    """Counts over one trial's responses to the bad prompts.

    Attributes:
        broken: Prompts with a broken response that is no refusal.
        opening: Mean log-odds of the base model's first tokens; nan if logits were not finite.
        rest: Other responses: prompt index and token ids.
    """

    refusals: int = 0
    broken: int = 0
    opening: float = 0.0
    rest: list[tuple[int, list[int]]] = field(default_factory=list)


@dataclass(frozen=True)
class RefusalCounter:
    """Counts refusals among the responses to the bad prompts.

    Attributes:
        response_tokens: Length in tokens up to which responses are judged.
        openings: First token of the base model's response to each bad prompt.
    """

    batches: PromptBatches
    watch: MarkerWatch
    response_tokens: int
    openings: tuple[int, ...]

    @classmethod
    def measured(cls, batches: PromptBatches, markers: RefusalMarkers, response_tokens: int) -> Self:
        """Measure the base model's openings; hooks must be inactive."""
        openings = batches.row_limit.fit(lambda rows: _openings(batches, rows))
        return cls(batches, MarkerWatch(batches.loaded.tokenizer, markers), response_tokens, tuple(openings))

    def count(
        self,
        trial_rows: TrialRows,
        trials: Sequence[int],
        rows: int,
        *,
        response_tokens: int | None = None,
        search_tokens: int | None = None,
    ) -> list[ResponseCounts]:
        """Return each trial's counts; a response broken within `search_tokens` tokens counts as broken too."""
        limit = response_tokens or self.response_tokens
        counts = [ResponseCounts() for _ in trials]
        start = 0
        for batch, owners in self.batches.generating(self.batches.bad.tokens, trial_rows, rows, trials):
            openings = list(self.openings[start : start + len(batch)]) * len(trials)
            responses = self._generate(batch * len(trials), owners, limit, openings)
            for row, response in enumerate(responses):
                prompt = start + row % len(batch)
                self._add(counts[row // len(batch)], prompt, response, limit, search_tokens)
            start += len(batch)
        return counts

    def _add(
        self, counts: ResponseCounts, prompt: int, response: Answer, limit: int, search_tokens: int | None
    ) -> None:
        counts.opening += (response.opening if response.finite else math.nan) / len(self.batches.bad)
        text = "" if response.decided else self.batches.loaded.decode(response.tokens)
        truncated = len(response.tokens) == limit < self.response_tokens
        if response.decided or self._is_refusal(text, truncated=truncated):
            counts.refusals += 1
        elif self._is_broken(prompt, text, response.tokens, search_tokens):
            counts.broken += 1
        else:
            counts.rest.append((prompt, response.tokens))

    def _is_refusal(self, text: str, *, truncated: bool) -> bool:
        markers = self.watch.markers
        # A blank beginning may still become a response, so full-length counts are never smaller.
        return markers.found(text) if truncated else markers.is_refusal(text)

    def _is_broken(self, prompt: int, text: str, tokens: list[int], search_tokens: int | None) -> bool:
        texts = [text] if search_tokens is None else [text, self.batches.loaded.decode(tokens[:search_tokens])]
        # A blank beginning is not broken yet.
        return any(text.strip() and is_broken(self.batches.bad.prompts[prompt].user, text) for text in texts)

    def _generate(
        self, prompts: Sequence[list[int]], owners: RowTrials, limit: int, openings: list[int]
    ) -> list[Answer]:
        """Decode one batch; rows stop at their first refusal marker."""
        marker_watches = [self.watch.begin() for _ in prompts]

        def holds_marker(row: int, tokens: list[int]) -> bool:
            return marker_watches[row].found(tokens)

        # A trial whose edit is too strong for the dtype fails alone (`TrialScorer`).
        return self.batches.generate(prompts, owners, limit, openings=openings, decided=holds_marker, may_fail=True)


def _openings(batches: PromptBatches, rows: int) -> list[int]:
    """Return the unedited model's first response token for each bad prompt."""
    model = batches.loaded.model
    return [
        token
        for batch, owners in batches.reading(batches.bad.tokens, batches.trial_rows(None), rows)
        for token in require_finite(first_logits(model, batch, owners)).argmax(-1).tolist()
    ]
