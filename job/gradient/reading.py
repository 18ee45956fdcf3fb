"""Forward prompts with forced responses differentiably: padded on the right, behind a prefix that is read once.

Left padding would leave positions that attend to nothing, with NaN gradients.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from job.generation.kv_cache import arguments, copied_rows


@dataclass(frozen=True)
class ForcedAnswers:
    """Prompts with responses of several lengths in one batch; n rows, t positions, up to a response tokens.

    Attributes:
        prefix: First tokens of all rows, read once for all of them, [p].
        tokens: Prompts and responses behind the prefix, except their last token, [n, t].
        mask: 1 for tokens, 0 for padding, the prefix included, [n, p + t].
        places: Positions in `tokens` whose logits predict the responses, [n, a].
        answers: Response tokens, padded with 0, [n, a].
        real: False for padding, [n, a].
    """

    prefix: Tensor
    tokens: Tensor
    mask: Tensor
    places: Tensor
    answers: Tensor
    real: Tensor

    @classmethod
    def of(
        cls, prompts: Sequence[list[int]], answers: Sequence[list[int]], device: torch.device, shared: int = 0
    ) -> Self:
        """Pad token ids of prompts and of their forced responses, each of at least one token.

        All prompts begin with the same `shared` tokens, and each has at least one more.
        """
        prefix, behind = prompts[0][:shared], [prompt[shared:] for prompt in prompts]
        rows = [prompt + answer[:-1] for prompt, answer in zip(behind, answers, strict=True)]
        width, longest = max(map(len, rows)), max(map(len, answers))
        lengths = torch.tensor([len(answer) for answer in answers])
        real = torch.arange(longest) < lengths[:, None]
        begin = torch.tensor([len(prompt) - 1 for prompt in behind])
        places = torch.where(real, begin[:, None] + torch.arange(longest), 0)
        padded = [row + [0] * (width - len(row)) for row in rows]
        mask = torch.arange(shared + width) < shared + torch.tensor([len(row) for row in rows])[:, None]
        forced = [answer + [0] * (longest - len(answer)) for answer in answers]
        tensors = (
            torch.tensor(prefix, dtype=torch.long),
            torch.tensor(padded),
            mask.to(torch.long),
            places,
            torch.tensor(forced),
            real,
        )
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
    begin = len(forced.prefix)
    positions = begin + torch.arange(forced.tokens.shape[1], device=forced.tokens.device).expand_as(forced.tokens)
    given: dict[str, Any] = {"position_ids": positions} if "position_ids" in arguments(model) else {}
    if begin:
        given["past_key_values"] = copied_rows(model, _prefix_cache(model, forced.prefix), len(forced.tokens))
    with _head_at(model, forced.places, beside) as gathered:
        output = model(input_ids=forced.tokens, attention_mask=forced.mask, use_cache=begin > 0, **given)
    return output.logits, gathered


def _prefix_cache(model: PreTrainedModel, prefix: Tensor) -> DynamicCache:
    """Return the keys and values of a prefix [p] in one row, with their gradients."""
    cache = DynamicCache(config=model.config)
    positions = torch.arange(len(prefix), device=prefix.device)[None]
    given = {"position_ids": positions, "logits_to_keep": 1}  # its logits are not used
    given = {name: value for name, value in given.items() if name in arguments(model)}
    mask = torch.ones_like(positions)
    model(input_ids=prefix[None], attention_mask=mask, past_key_values=cache, use_cache=True, **given)
    return cache


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
