"""KL divergence from the base model over the first tokens of its own answers, which are given and not decoded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from job.numerics.metrics import kl_divergence


@dataclass(frozen=True)
class Reference:
    """What the base model says to the good prompts.

    Attributes:
        tokens: Positions of its answers that are compared (N), at most.
        continuations: For each prompt the tokens of its answer that precede the last of those positions: N - 1, or
            all where the answer ends earlier, the position of its end being the last.
        logits: Its logits at all these positions, those of one prompt after those of another, [positions, vocabulary],
            in the type that the model computes them in; log-probabilities of them are made where they are needed.
    """

    tokens: int
    continuations: tuple[list[int], ...]
    logits: Tensor

    def forced(self, prompts: Sequence[list[int]], start: int) -> list[list[int]]:
        """Return the prompts from number start on, each with its continuation."""
        return forced(prompts, self.continuations[start:])

    def divergences(self, logits: Tensor, start: int, trials: int) -> Tensor:
        """Return the KL divergence of every trial on every prompt, mean over positions, [trials, prompts], float64.

        Args:
            logits: Of the forced prompts' last tokens, [trials * prompts, N, vocabulary].
            start: Number of the first prompt.
            trials: Number of trials; all prompts of one stand together.
        """
        prompts = len(logits) // trials
        lengths = self._lengths[start : start + prompts]
        first = sum(self._lengths[:start])
        base = self.logits[first : first + sum(lengths)].to(logits.device).to(torch.float32).log_softmax(-1)
        owner = torch.arange(prompts, device=logits.device).repeat_interleave(
            torch.tensor(lengths, device=logits.device)
        )
        found = logits.new_zeros(trials, prompts, dtype=torch.float64)
        for trial, own in enumerate(logits.view(trials, prompts, *logits.shape[1:])):
            found[trial].index_add_(0, owner, kl_divergence(base, real_positions(own, lengths)))
        return (found / torch.tensor(lengths, device=logits.device)).cpu()

    @property
    def first(self) -> Reference:
        """The same of the answers' first tokens alone."""
        starts = [sum(self._lengths[:index]) for index in range(len(self._lengths))]
        return Reference(1, ([],) * len(starts), self.logits[starts])

    @property
    def _lengths(self) -> list[int]:
        return [len(continuation) + 1 for continuation in self.continuations]


def forced(prompts: Sequence[list[int]], continuations: Sequence[list[int]]) -> list[list[int]]:
    """Return prompts with what their answers begin with."""
    return [prompt + continuation for prompt, continuation in zip(prompts, continuations, strict=False)]


def real_positions(logits: Tensor, lengths: Sequence[int]) -> Tensor:
    """Return the logits of answers' positions, those of one row after those of another, [positions, vocabulary].

    Args:
        logits: Of the last tokens of every row, [rows, N, vocabulary].
        lengths: How many of them, counted from the end, belong to the row's answer.
    """
    if logits.shape[1] == 1:
        return logits[:, 0]
    return torch.cat([row[-length:] for row, length in zip(logits, lengths, strict=True)])
