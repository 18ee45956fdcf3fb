"""Incoherent responses: the base model finds their tokens much less likely than those of its own responses.

The first tokens do not count: a compliant response is unlikely there too, because the base model would have refused.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch

from job.generation.answer import Answer
from job.generation.forward import last_logits
from job.scoring.prompt_batches import PromptBatches

# Ignored response tokens at the beginning, and the fewest judged tokens after them.
OPENING, LEAST = 4, 4
# The base model's own responses lie within this many robust standard deviations of their median.
_DEVIATIONS, _MAD_TO_SIGMA = 6.0, 1.4826

_Pair = tuple[tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True)
class IncoherenceTest:
    """Detects incoherent responses by the base model's likelihood of their tokens.

    Attributes:
        batches: The base model's prompts; hooks must be inactive during every call.
        bound: Least mean log-probability of a coherent response, nats per token; -inf disables the test.
    """

    batches: PromptBatches
    bound: float = -math.inf

    @classmethod
    def calibrated(cls, batches: PromptBatches, margin: float | None, responses: Sequence[Answer]) -> Self:
        """Set the bound from the base model's whole responses to the good prompts.

        It is their median minus the margin in nats per token; the margin is at least 6 robust standard deviations. A
        margin of None disables the test.
        """
        test = cls(batches)
        if margin is None:
            return test
        means = test.mean_log_probabilities(batches.good.tokens, [response.tokens for response in responses])
        means = [mean for mean in means if not math.isnan(mean)]
        if not means:
            return test
        median = statistics.median(means)
        sigma = _MAD_TO_SIGMA * statistics.median(abs(mean - median) for mean in means)
        return cls(batches, median - max(margin, _DEVIATIONS * sigma))

    def flags(self, responses: Sequence[Answer]) -> list[bool]:
        """Return which responses to all prompts, good ones first, are incoherent."""
        return self.incoherent(self.batches.everything, [response.tokens for response in responses])

    def incoherent(self, prompts: Sequence[list[int]], responses: Sequence[list[int]]) -> list[bool]:
        """Return which responses are incoherent; short ones never are."""
        if self.bound == -math.inf:
            return [False] * len(responses)
        return [mean < self.bound for mean in self.mean_log_probabilities(prompts, responses)]

    def mean_log_probabilities(self, prompts: Sequence[list[int]], responses: Sequence[list[int]]) -> list[float]:
        """Return each response's mean log-probability per token after its opening, in nats; nan if too short."""
        pairs = [(tuple(prompt), tuple(response)) for prompt, response in zip(prompts, responses, strict=True)]
        # Similar edits often give the same response: measure each once.
        judged = [pair for pair in dict.fromkeys(pairs) if len(pair[1]) >= OPENING + LEAST]
        judged.sort(key=lambda pair: len(pair[1]))  # less padding
        means = self.batches.row_limit.fit(lambda rows: self._measure(judged, rows)) if judged else []
        mean_of = dict(zip(judged, means, strict=True))
        return [mean_of.get(pair, math.nan) for pair in pairs]

    @torch.inference_mode()
    def _measure(self, pairs: Sequence[_Pair], rows: int) -> list[float]:
        loaded = self.batches.loaded
        means: list[float] = []
        if not loaded.architecture.batching.padded:
            rows = 1
        while len(means) < len(pairs):
            start = len(means)
            # `rows` bounds the positions with logits in a forward.
            longest = max(len(response) for _, response in pairs[start : start + rows])
            batch = pairs[start : start + max(1, rows // longest)]
            forced = [[*prompt, *response[:-1]] for prompt, response in batch]
            count = max(len(response) for _, response in batch) - OPENING
            logits = last_logits(loaded.model, forced, count)
            for row, (_, response) in zip(logits, batch, strict=True):
                tokens = torch.tensor(response[OPENING:], device=row.device)
                log_probabilities = row[-len(tokens) :].to(torch.float32).log_softmax(-1)
                means.append(float(log_probabilities.gather(1, tokens[:, None]).mean()))
        return means
