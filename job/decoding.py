"""Greedy decoding over transformers' caches; rows leave the batch as soon as they are decided."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from job.numerics.metrics import log_odds

# How often rows are asked whether they are decided; between, they cost little and decide nothing.
_ASK_EVERY = 4


def left_padded(prompts: Sequence[list[int]], device: torch.device | str) -> tuple[Tensor, Tensor, Tensor]:
    """Return token ids, attention mask and position ids, each [rows, t], padded on the left."""
    width = max(len(prompt) for prompt in prompts)
    tokens = torch.zeros(len(prompts), width, dtype=torch.long)
    mask = torch.zeros(len(prompts), width, dtype=torch.long)
    for index, prompt in enumerate(prompts):
        tokens[index, width - len(prompt) :] = torch.tensor(prompt)
        mask[index, width - len(prompt) :] = 1
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    return tokens.to(device), mask.to(device), positions.to(device)


@dataclass
class Answer:
    """A greedily decoded answer.

    Attributes:
        tokens: Its token ids without the end token.
        margins: For each step, the end included, how far the best logit was above the second.
        opening: Log-odds of the opening that was asked for, at the first step; nan if none was.
    """

    tokens: list[int] = field(default_factory=list)
    margins: list[float] = field(default_factory=list)
    opening: float = math.nan


@torch.inference_mode()
def first_logits(model: PreTrainedModel, prompts: Sequence[list[int]]) -> Tensor:
    """Return the logits of the first answer token, [rows, vocabulary], float32."""
    tokens, mask, positions = left_padded(prompts, model.device)
    output = model(input_ids=tokens, attention_mask=mask, position_ids=positions, use_cache=False, logits_to_keep=1)
    logits: Tensor = output.logits[:, -1].to(torch.float32)
    return logits


@torch.inference_mode()
def greedy_answers(
    model: PreTrainedModel,
    prompts: Sequence[list[int]],
    *,
    limit: int,
    end_tokens: Collection[int],
    openings: Sequence[int] | None = None,
    decided: Callable[[list[int]], bool] | None = None,
    select: Callable[[Tensor], None] | None = None,
) -> list[Answer]:
    """Return the most likely continuation of every prompt, token by token.

    Args:
        model: The model.
        prompts: Token ids of each prompt.
        limit: Longest answer in tokens.
        end_tokens: Tokens that end an answer.
        openings: For each prompt a token whose odds of opening the answer are wanted.
        decided: Whether the answer so far tells all that the caller wants to know of it.
        select: Told which rows of the present batch remain, whenever some leave.
    """
    tokens, mask, positions = left_padded(prompts, model.device)
    answers = [Answer() for _ in prompts]
    present = list(range(len(prompts)))
    positions_next = positions[:, -1:] + 1
    cache = DynamicCache(config=model.config)
    for step in range(limit):
        output = model(
            input_ids=tokens,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits = output.logits[:, -1].to(torch.float32)
        if step == 0 and openings is not None:
            asked = torch.tensor(openings, device=logits.device)
            for answer, odds in zip(answers, log_odds(logits, asked).tolist(), strict=True):
                answer.opening = odds
        best = logits.topk(2)
        chosen = best.indices[:, 0]
        ask = decided is not None and step % _ASK_EVERY == _ASK_EVERY - 1
        staying = []
        for row, (token, margin) in enumerate(
            zip(chosen.tolist(), (best.values[:, 0] - best.values[:, 1]).tolist(), strict=True)
        ):
            answer = answers[present[row]]
            answer.margins.append(margin)
            if token in end_tokens:
                continue
            answer.tokens.append(token)
            if not (ask and decided is not None and decided(answer.tokens)):
                staying.append(row)
        if not staying:
            break
        if len(staying) < len(present):
            keep = torch.tensor(staying, device=model.device)
            cache.batch_select_indices(keep)
            mask, positions_next, chosen = mask[keep], positions_next[keep], chosen[keep]
            present = [present[row] for row in staying]
            if select is not None:
                select(keep)
        tokens, positions = chosen[:, None], positions_next
        positions_next = positions_next + 1
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
    return answers
