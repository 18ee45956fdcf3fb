"""KL divergence from the base model, by teacher forcing over the first tokens of its own responses."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from job.edits.hooks import ActiveEdits
from job.generation.answer import Answer
from job.generation.finite import require_finite
from job.generation.forward import last_logits
from job.numerics.metrics import kl_divergence
from job.scoring.prompt_batches import PromptBatches, TrialRows


@dataclass(frozen=True)
class KLReference:
    """The base model's logits over its own responses to the good prompts.

    Attributes:
        tokens: Most positions compared per prompt (N).
        continuations: Per good prompt the response tokens before the last compared position: N - 1, or fewer if the
            response ends earlier; its end token is then the last position.
        logits: Logits at all compared positions, prompt after prompt, [positions, vocabulary], in the model's dtype.
    """

    tokens: int
    continuations: tuple[list[int], ...]
    logits: Tensor

    @classmethod
    def measured(cls, batches: PromptBatches, tokens: int) -> Self:
        """Generate the base model's responses and record logits at up to `tokens` positions; hooks must be inactive.

        Raises ImpossibleJobError if logits are not finite.
        """
        return batches.row_limit.fit(lambda rows: cls._measured(batches, tokens, rows))

    @classmethod
    def _measured(cls, batches: PromptBatches, tokens: int, rows: int) -> Self:
        continuations: list[list[int]] = [[] for _ in batches.good.tokens]
        if tokens > 1:
            responses = batches.responses(batches.good.tokens, tokens - 1, rows)
            continuations = [response.tokens for response in responses]
        return cls._forced(batches, tokens, continuations, rows, None)

    @classmethod
    def of_responses(cls, batches: PromptBatches, tokens: int, responses: Sequence[Answer]) -> Self:
        """Record logits at up to `tokens` positions of the base model's known responses; hooks must be inactive."""
        continuations = [response.tokens[: tokens - 1] for response in responses]
        return batches.row_limit.fit(lambda rows: cls._forced(batches, tokens, continuations, rows, None))

    def under(self, batches: PromptBatches, edits: ActiveEdits) -> Self:
        """Return the reference of the edited model, edit 0, at the same positions of the same responses."""
        continuations = list(self.continuations)
        return batches.row_limit.fit(lambda rows: self._forced(batches, self.tokens, continuations, rows, edits))

    @classmethod
    def _forced(
        cls,
        batches: PromptBatches,
        tokens: int,
        continuations: Sequence[list[int]],
        rows: int,
        edits: ActiveEdits | None,
    ) -> Self:
        logits: list[Tensor] = []
        start = 0
        for batch, owners in batches.reading(batches.good.tokens, batches.trial_rows(edits), rows, tokens):
            batch_continuations = continuations[start : start + len(batch)]
            batch_logits = last_logits(batches.loaded.model, forced(batch, batch_continuations), tokens, owners)
            lengths = [len(continuation) + 1 for continuation in batch_continuations]
            logits.append(require_finite(real_positions(batch_logits, lengths)))
            start += len(batch)
        # With several positions the logits would use device memory planned for forwards.
        all_logits = torch.cat(logits if tokens == 1 else [part.cpu() for part in logits])
        return cls(tokens, tuple(continuations), all_logits)

    def trial_means(self, batches: PromptBatches, trial_rows: TrialRows, rows: int) -> list[float]:
        """Return every trial's mean KL in nats; `rows` limits positions with logits per forward."""
        total = torch.zeros(trial_rows.trials, dtype=torch.float64)
        for divergences in self._divergences_by_batch(batches, trial_rows, rows):
            total += divergences.sum(1)
        means: list[float] = (total / len(batches.good)).tolist()
        return means

    def trial_divergences(self, batches: PromptBatches, trial_rows: TrialRows, rows: int) -> Tensor:
        """Return every trial's KL per good prompt in nats, [trials, prompts]; `rows` as in `trial_means`."""
        return torch.cat(list(self._divergences_by_batch(batches, trial_rows, rows)), dim=1)

    def divergences(self, batches: PromptBatches, edits: ActiveEdits | None = None) -> list[float]:
        """Return a model's KL per good prompt in nats, mean over positions; active edits apply as edit 0."""

        def measure(rows: int) -> list[float]:
            by_batch = self._divergences_by_batch(batches, batches.trial_rows(edits), rows)
            return [kl for divergences in by_batch for kl in divergences[0].tolist()]

        # Rounding may make a KL divergence as small as -1e-17.
        return [max(kl, 0.0) for kl in batches.row_limit.fit(measure)]

    def _divergences_by_batch(self, batches: PromptBatches, trial_rows: TrialRows, rows: int) -> Iterator[Tensor]:
        """Yield the KL divergences of each batch, [trials, prompts in the batch]."""
        start = 0
        for batch, owners in batches.reading(batches.good.tokens, trial_rows, rows, self.tokens):
            prompts = forced(batch, self.continuations[start:]) * trial_rows.trials
            logits = last_logits(batches.loaded.model, prompts, self.tokens, owners)
            yield self._divergences_of_logits(logits, start, trial_rows.trials)
            start += len(batch)

    def _divergences_of_logits(self, logits: Tensor, start: int, trials: int) -> Tensor:
        """Return KL divergences, mean over positions, [trials, prompts], float64, on the CPU.

        `logits` [trials * prompts, N, vocabulary] are the forced prompts' last tokens, each trial's prompts adjacent;
        `start` is the index of the first prompt.
        """
        prompts = len(logits) // trials
        lengths = self._lengths[start : start + prompts]
        first = sum(self._lengths[:start])
        base = self.logits[first : first + sum(lengths)].to(logits.device).to(torch.float32).log_softmax(-1)
        # Sums over a table: on a GPU index_add_ adds in any order, and equal edits would get different values.
        table = logits.new_zeros(trials, prompts, max(lengths), dtype=torch.float64)
        positions = torch.tensor(lengths, device=logits.device)
        is_real = torch.arange(max(lengths), device=logits.device) < positions[:, None]
        for divergences, trial_logits in zip(table, logits.view(trials, prompts, *logits.shape[1:]), strict=True):
            divergences.masked_scatter_(is_real, kl_divergence(base, real_positions(trial_logits, lengths)))
        return (table.sum(-1) / positions).cpu()

    @property
    def first_token(self) -> KLReference:
        """The reference for the responses' first tokens alone."""
        starts = [sum(self._lengths[:index]) for index in range(len(self._lengths))]
        return KLReference(1, ([],) * len(starts), self.logits[starts])

    @property
    def _lengths(self) -> list[int]:
        return [len(continuation) + 1 for continuation in self.continuations]


def forced(prompts: Sequence[list[int]], continuations: Sequence[list[int]]) -> list[list[int]]:
    """Append its continuation to each prompt; excess continuations are ignored."""
    return [prompt + continuation for prompt, continuation in zip(prompts, continuations, strict=False)]


def real_positions(logits: Tensor, lengths: Sequence[int]) -> Tensor:
    """Return logits without padding, [positions, vocabulary]; `logits` are the last tokens', [rows, N, vocabulary]."""
    if logits.shape[1] == 1:
        return logits[:, 0]
    return torch.cat([row[-length:] for row, length in zip(logits, lengths, strict=True)])
