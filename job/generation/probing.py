"""A family's support for batching, probed on a small random model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import (
    PreTrainedModel,
)

from job.generation.answer import Answer
from job.generation.batching import BatchingSupport
from job.generation.forward import (
    RowTrials,
    first_logits,
    shared_prefix,
)
from job.generation.greedy import greedy_answers
from job.generation.kv_cache import (
    writable_slots,
)

# Probe: two prompts of different lengths, decoding steps, and tolerance of logits in standard deviations.
_TRIED, _STEPS, _APART = ([5, 9, 11, 13, 6], [5, 9, 11, 13, 6, 10, 8, 14, 7]), 4, 1e-3

_FAULTS = (RuntimeError, ValueError, TypeError, KeyError, IndexError, AttributeError, AssertionError)


def probe_batching(model: PreTrainedModel) -> BatchingSupport:
    """Probe how the family of a small random model can be batched; its forward may raise anything."""
    prompts = list(_TRIED)
    alone = torch.cat([first_logits(model, [prompt]) for prompt in prompts])
    scale = float(
        alone[alone > torch.finfo(alone.dtype).min / 2].std()
    )  # some families mask tokens by the least number
    try:
        padded = _is_close(first_logits(model, prompts), alone, scale)
    except _FAULTS:
        padded = False
    chunks = list(BatchingSupport(padded).chunks(prompts, len(prompts)))
    again = _answers_of(model, chunks, BatchingSupport(padded, cached=False))
    try:
        kept = _answers_of(model, chunks, BatchingSupport(padded))
    except _FAULTS:
        return BatchingSupport(padded, cached=False, shared=False)
    if not all(_is_same_answer(one, other, scale) for one, other in zip(again, kept, strict=True)):
        raise ValueError("what it says next depends on what was kept of the text before")
    return BatchingSupport(padded, True, padded and _shares(model, prompts, alone, scale))


def _shares(model: PreTrainedModel, prompts: Sequence[list[int]], alone: Tensor, scale: float) -> bool:
    """Return whether logits stay the same with a precomputed prefix."""
    length = min(len(_TRIED[0]) - 1, writable_slots(model))
    if length < 1:
        return False
    prefix = shared_prefix(model, list(_TRIED[0][:length]), 1, None)
    shared = RowTrials(torch.zeros(len(prompts), dtype=torch.long), prefix=prefix)
    return _is_close(first_logits(model, prompts, shared), alone, scale)


def _answers_of(model: PreTrainedModel, chunks: Sequence[list[list[int]]], batching: BatchingSupport) -> list[Answer]:
    answered = (greedy_answers(model, chunk, limit=_STEPS, end_tokens=(), batching=batching) for chunk in chunks)
    return [answer for answers in answered for answer in answers]


def _is_close(one: Tensor, other: Tensor, scale: float) -> bool:
    return bool(((one - other).abs() < _APART * scale).all())


def _is_same_answer(one: Answer, other: Answer, scale: float) -> bool:
    return one.tokens == other.tokens and _is_close(torch.tensor(one.margins), torch.tensor(other.margins), scale)
