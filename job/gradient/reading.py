"""Forward prompts with forced responses differentiably: padded on the right, without caches.

Left padding would leave positions that attend to nothing, with NaN gradients.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from job.generation.kv_cache import arguments


@dataclass(frozen=True)
class ForcedAnswers:
    """Prompts with responses of several lengths in one batch; n rows, t positions, up to a response tokens.

    Attributes:
        tokens: Prompts and responses except their last token, [n, t].
        mask: 1 for tokens, 0 for padding, [n, t].
        places: Positions whose logits predict the responses, [n, a].
        answers: Response tokens, padded with 0, [n, a].
        real: False for padding, [n, a].
    """

    tokens: Tensor
    mask: Tensor
    places: Tensor
    answers: Tensor
    real: Tensor

    @classmethod
    def of(cls, prompts: Sequence[list[int]], answers: Sequence[list[int]], device: torch.device) -> Self:
        """Pad token ids of prompts and of their forced responses, each of at least one token."""
        rows = [prompt + answer[:-1] for prompt, answer in zip(prompts, answers, strict=True)]
        width, longest = max(map(len, rows)), max(map(len, answers))
        lengths = torch.tensor([len(answer) for answer in answers])
        real = torch.arange(longest) < lengths[:, None]
        begin = torch.tensor([len(prompt) - 1 for prompt in prompts])
        places = torch.where(real, begin[:, None] + torch.arange(longest), 0)
        padded = [row + [0] * (width - len(row)) for row in rows]
        mask = torch.arange(width) < torch.tensor([len(row) for row in rows])[:, None]
        forced = [answer + [0] * (longest - len(answer)) for answer in answers]
        tensors = (torch.tensor(padded), mask.to(torch.long), places, torch.tensor(forced), real)
        return cls(*(tensor.to(device) for tensor in tensors))


def answer_logits(model: PreTrainedModel, forced: ForcedAnswers, beside: Tensor | None = None) -> Tensor:
    """Return the logits that predict the responses' tokens, [n, a, vocabulary], at least float32.

    The head computes no others: those of all positions would be by far the largest tensor of a step. `beside` [m, a, d]
    are further inputs of the head, as `head_inputs` returns them; their logits follow, [n + m, a, vocabulary].
    """
    logits, gathered = _forward(model, forced, beside)
    if not gathered:
        logits = logits[torch.arange(len(logits), device=logits.device)[:, None], forced.places.to(logits.device)]
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


@torch.no_grad()
def head_inputs(model: PreTrainedModel, forced: ForcedAnswers) -> Tensor | None:
    """Return the head's inputs at the responses' positions, [n, a, d], None if its module does not compute all logits.

    They take d numbers a position where logits take the vocabulary's size.
    """
    _, gathered = _forward(model, forced, None)
    return gathered[0] if len(gathered) == 1 else None


def _forward(model: PreTrainedModel, forced: ForcedAnswers, beside: Tensor | None) -> tuple[Tensor, list[Tensor]]:
    """Return the model's logits, and its head's inputs at the responses' positions for each call of the head."""
    positions = torch.arange(forced.tokens.shape[1], device=forced.tokens.device).expand_as(forced.tokens)
    given: dict[str, Any] = {"position_ids": positions} if "position_ids" in arguments(model) else {}
    with _head_at(model, forced.places, beside) as gathered:
        output = model(input_ids=forced.tokens, attention_mask=forced.mask, use_cache=False, **given)
    return output.logits, gathered


@contextmanager
def _head_at(model: PreTrainedModel, places: Tensor, beside: Tensor | None) -> Iterator[list[Tensor]]:
    """Restrict the head to some positions of every row, and to `beside`; yield a list of those inputs of its calls."""
    head = model.get_output_embeddings()
    seen: list[Tensor] = []

    def pick(_module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden = inputs[0]
        rows = torch.arange(len(hidden), device=hidden.device)[:, None]
        seen.append(hidden[rows, places.to(hidden.device)])
        there = seen[-1] if beside is None else torch.cat([seen[-1], beside.to(seen[-1])])
        return (there, *inputs[1:])

    if head is None:
        yield seen
        return
    handle = head.register_forward_pre_hook(pick)
    try:
        yield seen
    finally:
        handle.remove()
