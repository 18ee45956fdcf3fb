"""Gibberish, told by the base model: an answer whose words it would hardly have said, one after another.

The opening does not count: that the model would rather have refused shows there, in a compliant answer as in a broken
one, and hardly after it.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence

import torch

from job.generation.forward import last_logits
from job.model.loading import LoadedModel

# Tokens at the beginning that do not count, and how many must be left for a judgement.
OPENING, LEAST = 4, 4
# Deviations from the median of its own answers within which the base model is as it always is.
_DEVIATIONS, _TO_SIGMA = 6.0, 1.4826


# Computes something with as many rows a forward as memory allows, given a function of that number.
Fitting = Callable[[Callable[[int], list[float]]], list[float]]


class Fluency:
    """How likely the base model finds the words of answers, by the measure of its own to ordinary prompts."""

    def __init__(self, loaded: LoadedModel, fitting: Fitting, margin: float) -> None:
        """Prepare.

        Args:
            loaded: The base model; hooks on it must be at rest whenever it is asked.
            fitting: Calls what computes with a number of rows.
            margin: Nats a token by which an answer must be less likely than the base model's own to count as gibberish.
        """
        self._loaded = loaded
        self._fitting = fitting
        self._margin = margin
        self.bound = -math.inf

    def calibrate(self, prompts: Sequence[list[int]], answers: Sequence[list[int]]) -> None:
        """Set the bound from the base model's own answers: their median less margin, or less 6 robust deviations.

        Args:
            prompts: Token ids of ordinary prompts.
            answers: Token ids of the base model's answers to them.
        """
        own = [found for found in self.means(prompts, answers) if not math.isnan(found)]
        if own:
            middle = statistics.median(own)
            spread = _TO_SIGMA * statistics.median(abs(found - middle) for found in own)
            self.bound = middle - max(self._margin, _DEVIATIONS * spread)

    def gibberish(self, prompts: Sequence[list[int]], answers: Sequence[list[int]]) -> list[bool]:
        """Return for each answer whether it is; too short ones and any before `calibrate` are not."""
        return [found < self.bound for found in self.means(prompts, answers)]

    def means(self, prompts: Sequence[list[int]], answers: Sequence[list[int]]) -> list[float]:
        """Return each answer's mean log-probability of a token after its opening, in nats; nan if it is too short."""
        said = [(tuple(prompt), tuple(answer)) for prompt, answer in zip(prompts, answers, strict=True)]
        # Edits that differ little often answer alike.
        long = [pair for pair in dict.fromkeys(said) if len(pair[1]) >= OPENING + LEAST]
        long.sort(key=lambda pair: len(pair[1]))  # so that forwards waste little on padding
        measured = self._fitting(lambda rows: self._means(long, rows)) if long else []
        found = dict(zip(long, measured, strict=True))
        return [found.get(pair, math.nan) for pair in said]

    @torch.inference_mode()
    def _means(self, said: Sequence[tuple[tuple[int, ...], tuple[int, ...]]], rows: int) -> list[float]:
        found: list[float] = []
        if not self._loaded.architecture.manner.padded:
            rows = 1
        while len(found) < len(said):
            start = len(found)
            # A forward has logits for no more positions than rows were planned for.
            longest = max(len(answer) for _, answer in said[start : start + rows])
            part = said[start : start + max(1, rows // longest)]
            forced = [[*prompt, *answer[:-1]] for prompt, answer in part]
            count = max(len(answer) for _, answer in part) - OPENING
            logits = last_logits(self._loaded.model, forced, count)
            for row, (_, answer) in zip(logits, part, strict=True):
                words = torch.tensor(answer[OPENING:], device=row.device)
                own = row[-len(words) :].to(torch.float32).log_softmax(-1)
                found.append(float(own.gather(1, words[:, None]).mean()))
        return found
