"""Counting refusals and broken responses of many trials in one batch, with early stopping."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Self

import torch

from job.generation.answer import Answer
from job.generation.finite import require_finite
from job.generation.forward import RowTrials, first_logits
from job.generation.stop_markers import AnswerWatch, MarkerWatch
from job.scoring.broken import Exchange, is_broken
from job.scoring.prompt_batches import PromptBatches, TrialRows
from job.scoring.soft_refusals import is_evasion
from job.text.refusal_markers import RefusalMarkers


@dataclass
class ResponseCounts:
    """Counts over one trial's responses to the bad prompts.

    Attributes:
        prompts: Responses that were counted.
        refusals: Refused prompts, and evasive responses where they count (`RefusalMarkers.evasions`).
        broken: Prompts with a broken response that is no refusal.
        opening: Log-odds of the base model's first tokens, summed and divided by the number of all prompts; nan if
            logits were not finite.
        rest: Other responses: prompt index and token ids.
        exchanges: All responses by prompt index, if they are kept.
    """

    prompts: int = 0
    refusals: int = 0
    broken: int = 0
    opening: float = 0.0
    rest: list[tuple[int, list[int]]] = field(default_factory=list)
    exchanges: dict[int, Exchange] = field(default_factory=dict)

    @property
    def unanswered(self) -> int:
        """Prompts without a usable response."""
        return self.refusals + self.broken

    def add(self, others: ResponseCounts) -> None:
        """Add the counts of responses to other prompts."""
        self.prompts += others.prompts
        self.refusals += others.refusals
        self.broken += others.broken
        self.opening += others.opening
        self.rest += others.rest
        self.exchanges |= others.exchanges

    def add_incoherent(self, prompt: int) -> None:
        """Count a response of `rest` as broken."""
        self.broken += 1
        if prompt in self.exchanges:
            self.exchanges[prompt] = replace(self.exchanges[prompt], incoherent=True)


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

    @property
    def by_markers(self) -> Self:
        """The same counter, to which evasive responses without a marker are no refusals."""
        return replace(self, watch=MarkerWatch(self.batches.loaded.tokenizer, self.watch.markers.alone))

    def count(
        self,
        trial_rows: TrialRows,
        trials: Sequence[int],
        rows: int,
        *,
        prompts: Sequence[Sequence[int]] | None = None,
        response_tokens: int | None = None,
        search_tokens: int | None = None,
        keep: bool = False,
    ) -> list[ResponseCounts]:
        """Return each trial's counts; a response broken within `search_tokens` tokens counts as broken too.

        `prompts` are, for each trial, the indices of those to answer; None: all. With `keep`, responses are kept, and
        refusals are not cut at their first marker.
        """
        limit = response_tokens or self.response_tokens
        counts = [ResponseCounts() for _ in trials]
        bad, start = self.batches.bad, 0
        wanted = [set(range(len(bad)))] * len(trials) if prompts is None else [set(some) for some in prompts]
        union = sorted(set().union(*wanted))
        for batch, owners in self.batches.generating([bad.tokens[i] for i in union], trial_rows, rows, trials):
            part = union[start : start + len(batch)]
            start += len(batch)
            each = [(trial, prompt) for trial in range(len(trials)) for prompt in part]
            chosen = [row for row, (trial, prompt) in enumerate(each) if prompt in wanted[trial]]
            asked = [each[row] for row in chosen]
            openings = [self.openings[prompt] for _, prompt in asked]
            watches = [self.watch.begin(bad.prompts[prompt].user) for _, prompt in asked]
            picked = (
                owners if len(chosen) == len(each) else owners.pick(torch.tensor(chosen, device=owners.trials.device))
            )
            tokens = [bad.tokens[prompt] for _, prompt in asked]
            responses = self._generate(tokens, picked, limit, openings, None if keep else watches)
            for (trial, prompt), response in zip(asked, responses, strict=True):
                text = "" if response.decided else self.batches.loaded.decode(response.tokens)
                broken = self._add(counts[trial], prompt, response, text, limit, search_tokens)
                if keep:
                    counts[trial].exchanges[prompt] = Exchange(bad.prompts[prompt].user, text, broken)
        return counts

    def _add(
        self,
        counts: ResponseCounts,
        prompt: int,
        response: Answer,
        text: str,
        limit: int,
        search_tokens: int | None,
    ) -> bool:
        """Add a response; return whether it counts as broken."""
        counts.prompts += 1
        counts.opening += (response.opening if response.finite else math.nan) / len(self.batches.bad)
        truncated = len(response.tokens) == limit < self.response_tokens
        if response.decided or self._is_refusal(prompt, text, truncated=truncated):
            counts.refusals += 1
            return False
        # What the search read counts too, so full-length counts are never smaller.
        texts = [text] if search_tokens is None else [text, self.batches.loaded.decode(response.tokens[:search_tokens])]
        if self._is_broken(prompt, texts):
            counts.broken += 1
            return True
        asked = self.batches.bad.prompts[prompt].user
        if self.watch.markers.evasions and any(is_evasion(asked, one) for one in texts):
            counts.refusals += 1
            return False
        counts.rest.append((prompt, response.tokens))
        return False

    def _is_refusal(self, prompt: int, text: str, *, truncated: bool) -> bool:
        markers = self.watch.markers.for_prompt(self.batches.bad.prompts[prompt].user)
        # A blank beginning may still become a response, so full-length counts are never smaller.
        return markers.found(text) if truncated else markers.is_refusal(text)

    def _is_broken(self, prompt: int, texts: Sequence[str]) -> bool:
        # A blank beginning is not broken yet.
        return any(text.strip() and is_broken(self.batches.bad.prompts[prompt].user, text) for text in texts)

    def _generate(
        self,
        prompts: Sequence[list[int]],
        owners: RowTrials,
        limit: int,
        openings: list[int],
        watches: Sequence[AnswerWatch] | None,
    ) -> list[Answer]:
        """Decode one batch; watched rows stop at their first refusal marker."""
        decided = None if watches is None else lambda row, tokens: watches[row].found(tokens)
        # A trial whose edit is too strong for the dtype fails alone (`TrialScorer`).
        return self.batches.generate(prompts, owners, limit, openings=openings, decided=decided, may_fail=True)


def _openings(batches: PromptBatches, rows: int) -> list[int]:
    """Return the unedited model's first response token for each bad prompt."""
    model = batches.loaded.model
    return [
        token
        for batch, owners in batches.reading(batches.bad.tokens, batches.trial_rows(None), rows)
        for token in require_finite(first_logits(model, batch, owners)).argmax(-1).tolist()
    ]
