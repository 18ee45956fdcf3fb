"""Greedy decoding over transformers' caches; rows leave the batch as soon as they are decided."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteriaList,
)

from job.caches import SharedPrefix, arguments, longest_shared_prefix, rows_can_be_picked, takes_cache
from job.numerics.metrics import log_odds
from job.placement import input_device


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


@dataclass(frozen=True)
class Manner:
    """How the models of a family can be read; most can in every manner.

    Attributes:
        padded: Rows of several lengths may stand in one forward: padding does not matter to what they say.
        cached: A token can be decoded on what was kept of those before it; else all are read again.
        shared: What rows begin with can be read once for all of them: it does not depend on what follows.
    """

    padded: bool = True
    cached: bool = True
    shared: bool = True

    def chunks(self, prompts: Sequence[list[int]], rows: int, positions: int = 1) -> Iterator[list[list[int]]]:
        """Yield prompts, in order, in what one forward takes.

        Args:
            prompts: Token ids of each prompt.
            rows: Prompts in one forward at most.
            positions: Of how many positions a row logits are wanted; continuations of one length are not always.
        """
        chunk: list[list[int]] = []
        for prompt in prompts:
            alike = self.padded or (positions == 1 and all(len(prompt) == len(other) for other in chunk))
            if chunk and (len(chunk) == rows or not alike):
                yield chunk
                chunk = []
            chunk.append(prompt)
        if chunk:
            yield chunk


@dataclass(frozen=True)
class Shared:
    """A prefix that all prompts of a forward share.

    Attributes:
        prefix: What has been computed of it.
        trials: Trial of every row, [rows].
    """

    prefix: SharedPrefix
    trials: Tensor


@torch.inference_mode()
def shared_prefix(model: PreTrainedModel, tokens: list[int], trials: int) -> SharedPrefix:
    """Return what a model computes of a prefix, with one row a trial."""
    cache = DynamicCache(config=model.config)
    ids, mask, positions = left_padded([tokens] * trials, input_device(model))
    _forward(model, ids, mask, positions, cache)
    return SharedPrefix.of(len(tokens), cache)


@torch.inference_mode()
def first_logits(model: PreTrainedModel, prompts: Sequence[list[int]], shared: Shared | None = None) -> Tensor:
    """Return the logits of the first answer token, [rows, vocabulary], float32."""
    return last_logits(model, prompts, 1, shared)[:, -1].to(torch.float32)


@torch.inference_mode()
def last_logits(
    model: PreTrainedModel, prompts: Sequence[list[int]], count: int, shared: Shared | None = None
) -> Tensor:
    """Return the logits that the last tokens of every prompt lead to, [rows, count, vocabulary].

    Args:
        model: The model.
        prompts: Token ids of each prompt.
        count: Number of tokens at the end of the prompts.
        shared: A prefix that all prompts begin with, and that leaves at least so many tokens of each.
    """
    tokens, mask, positions = left_padded(prompts, input_device(model))
    if shared is None:
        return _forward(model, tokens, mask, positions, None, count)
    cache, begin = _on_prefix(model, mask, shared), shared.prefix.length
    return _forward(model, tokens[:, begin:], mask, positions[:, begin:], cache, count)


def _on_prefix(model: PreTrainedModel, mask: Tensor, shared: Shared) -> DynamicCache:
    return shared.prefix.expanded(model, shared.trials, mask.shape[1] - mask.sum(1))


def _forward(
    model: PreTrainedModel,
    tokens: Tensor,
    mask: Tensor,
    positions: Tensor,
    cache: DynamicCache | None,
    count: int = 1,
) -> Tensor:
    """Return the logits of the last tokens, [rows, count, vocabulary]; what a forward does not know it is not given."""
    given: dict[str, Any] = {"position_ids": positions, "logits_to_keep": count}
    if cache is not None:
        given["past_key_values"] = cache
    known = arguments(model)
    given = {name: value for name, value in given.items() if name in known}
    output = model(input_ids=tokens, attention_mask=mask, use_cache=cache is not None, **given)
    logits: Tensor = output.logits[:, -count:]
    return logits


class _Ledger:
    """The answers so far, and which rows still go on."""

    def __init__(
        self,
        rows: int,
        end_tokens: Collection[int],
        openings: Sequence[int] | None,
        decided: Callable[[int, list[int]], bool] | None,
    ) -> None:
        self.answers = [Answer() for _ in range(rows)]
        self.going = set(range(rows))
        self._end_tokens = end_tokens
        self._openings = openings
        self._decided = decided

    def take(self, logits: Tensor, present: Sequence[int]) -> Tensor:
        """Write down a step and return its tokens, [rows present].

        Args:
            logits: The step's logits, [rows present, vocabulary].
            present: Which prompt each row answers.
        """
        logits = logits.to(torch.float32)
        if self._openings is not None:
            asked = torch.tensor(self._openings, device=logits.device)
            for answer, odds in zip(self.answers, log_odds(logits, asked).tolist(), strict=True):
                answer.opening = odds
            self._openings = None
        best = logits.topk(2)
        margins = (best.values[:, 0] - best.values[:, 1]).tolist()
        for index, token, margin in zip(present, best.indices[:, 0].tolist(), margins, strict=True):
            if index not in self.going:
                continue
            answer = self.answers[index]
            answer.margins.append(margin)
            if token in self._end_tokens:
                self.going.remove(index)
                continue
            answer.tokens.append(token)
            if self._decided is not None and self._decided(index, answer.tokens):
                self.going.remove(index)
        return best.indices[:, 0]


@torch.inference_mode()
def greedy_answers(
    model: PreTrainedModel,
    prompts: Sequence[list[int]],
    *,
    limit: int,
    end_tokens: Collection[int],
    openings: Sequence[int] | None = None,
    decided: Callable[[int, list[int]], bool] | None = None,
    select: Callable[[Tensor], None] | None = None,
    shared: Shared | None = None,
    manner: Manner = Manner(),
) -> list[Answer]:
    """Return the most likely continuation of every prompt, token by token.

    Models whose caches do not let rows go are decoded with all rows to the end; those that take no cache of
    transformers' own kind, by their own `generate`. The answers are the same.

    Args:
        model: The model.
        prompts: Token ids of each prompt.
        limit: Longest answer in tokens.
        end_tokens: Tokens that end an answer.
        openings: For each prompt a token whose odds of opening the answer are wanted.
        decided: Given a prompt's index and its answer so far, whether that tells all that the caller wants to know.
        select: Told which rows of the present batch remain, whenever some leave.
        shared: A prefix that all prompts begin with.
        manner: How the model can be read.
    """
    ledger = _Ledger(len(prompts), end_tokens, openings, decided)
    if not manner.cached:
        _read_again(model, prompts, limit, ledger, select)
        return ledger.answers
    if not takes_cache(model):
        _generate(model, prompts, limit, end_tokens, ledger)
        return ledger.answers
    tokens, mask, positions = left_padded(prompts, input_device(model))
    positions_next = positions[:, -1:] + 1
    if shared is None:
        cache = DynamicCache(config=model.config)
    else:
        cache, begin = _on_prefix(model, mask, shared), shared.prefix.length
        tokens, positions = tokens[:, begin:], positions[:, begin:]
    pickable = rows_can_be_picked(model)
    present = list(range(len(prompts)))
    for _ in range(limit):
        chosen = ledger.take(_forward(model, tokens, mask, positions, cache)[:, -1], present)
        if not ledger.going:
            break
        if pickable and len(ledger.going) < len(present):
            staying = [row for row, index in enumerate(present) if index in ledger.going]
            keep = torch.tensor(staying, device=input_device(model))
            cache.reorder_cache(keep)
            mask, positions_next, chosen = mask[keep], positions_next[keep], chosen[keep]
            present = [present[row] for row in staying]
            if select is not None:
                select(keep)
        tokens, positions = chosen[:, None], positions_next
        positions_next = positions_next + 1
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
    return ledger.answers


def _read_again(
    model: PreTrainedModel,
    prompts: Sequence[list[int]],
    limit: int,
    ledger: _Ledger,
    select: Callable[[Tensor], None] | None,
) -> None:
    """Decode without a cache: for every token the whole of a row is read again."""
    present = list(range(len(prompts)))
    for _ in range(limit):
        rows = [[*prompts[index], *ledger.answers[index].tokens] for index in present]
        ledger.take(last_logits(model, rows, 1)[:, -1], present)
        if not ledger.going:
            break
        staying = [row for row, index in enumerate(present) if index in ledger.going]
        if len(staying) < len(present) and select is not None:
            select(torch.tensor(staying, device=input_device(model)))
        present = [present[row] for row in staying]


# What tells how a model can be read: two prompts of unlike lengths, steps, and how far logits may be apart.
_TRIED, _STEPS, _APART = ([5, 9, 11, 13, 6], [5, 9, 11, 13, 6, 10, 8, 14, 7]), 4, 1e-3
_FAULTS = (RuntimeError, ValueError, TypeError, KeyError, IndexError, AttributeError, AssertionError)


def manner_of(model: PreTrainedModel) -> Manner:
    """Return how the models of a small random model's family can be read, found by trying it.

    Raises:
        Exception: Its forward does not read text as others do; which one is the family's own affair.
    """
    prompts = list(_TRIED)
    alone = torch.cat([first_logits(model, [prompt]) for prompt in prompts])
    scale = float(alone.std())
    try:
        padded = _near(first_logits(model, prompts), alone, scale)
    except _FAULTS:
        padded = False
    chunks = list(Manner(padded).chunks(prompts, len(prompts)))
    again = _answers_of(model, chunks, Manner(padded, cached=False))
    try:
        kept = _answers_of(model, chunks, Manner(padded))
    except _FAULTS:
        return Manner(padded, cached=False, shared=False)
    if not all(_same(one, other, scale) for one, other in zip(again, kept, strict=True)):
        raise ValueError("what it says next depends on what was kept of the text before")
    return Manner(padded, True, padded and _shares(model, prompts, alone, scale))


def _shares(model: PreTrainedModel, prompts: Sequence[list[int]], alone: Tensor, scale: float) -> bool:
    """Return whether prompts' logits are those they have alone when what they begin with has been read before."""
    length = min(len(_TRIED[0]) - 1, longest_shared_prefix(model))
    if length < 1:
        return False
    shared = Shared(shared_prefix(model, list(_TRIED[0][:length]), 1), torch.zeros(len(prompts), dtype=torch.long))
    return _near(first_logits(model, prompts, shared), alone, scale)


def _answers_of(model: PreTrainedModel, chunks: Sequence[list[list[int]]], manner: Manner) -> list[Answer]:
    answered = (greedy_answers(model, chunk, limit=_STEPS, end_tokens=(), manner=manner) for chunk in chunks)
    return [answer for answers in answered for answer in answers]


def _near(one: Tensor, other: Tensor, scale: float) -> bool:
    return bool(((one - other).abs() < _APART * scale).all())


def _same(one: Answer, other: Answer, scale: float) -> bool:
    return one.tokens == other.tokens and _near(torch.tensor(one.margins), torch.tensor(other.margins), scale)


def _generate(
    model: PreTrainedModel, prompts: Sequence[list[int]], limit: int, end_tokens: Collection[int], ledger: _Ledger
) -> None:
    """Decode by the model's own `generate`, of which the ledger sees every step's logits."""
    tokens, mask, _ = left_padded(prompts, input_device(model))
    rows = range(len(prompts))

    def see(_: Tensor, logits: Tensor) -> Tensor:
        ledger.take(logits, rows)
        return logits

    def ended(ids: Tensor, _: Any) -> Tensor:
        return torch.tensor([row not in ledger.going for row in rows], device=ids.device)

    # What the model's own configuration asks for beyond greedy decoding is put back to nothing.
    config = GenerationConfig(
        do_sample=False,
        num_beams=1,
        max_new_tokens=limit,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        eos_token_id=sorted(end_tokens) or [-1],  # not the model's own, which may be others
        pad_token_id=0,
        disable_compile=True,
    )
    model.generate(
        input_ids=tokens,
        attention_mask=mask,
        generation_config=config,
        logits_processor=LogitsProcessorList([see]),
        stopping_criteria=StoppingCriteriaList([ended]),
    )
