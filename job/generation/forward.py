"""One forward of a batch: padding, positions, shared prefixes, and the edits of its rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    PreTrainedModel,
)

from job.generation.kv_cache import (
    SharedPrefix,
    arguments,
)
from job.records import READ_TOKENS

# What is called after every forward with the number of tokens that were read.
_COUNTERS: list[Callable[[int], None]] = []
# What stands for no device of its own in a device map.
_OFFLOADED = ("cpu", "disk")


def input_device(model: PreTrainedModel) -> torch.device:
    """Return the device that inputs go to: that of the first weights, or where these are brought for a forward."""
    device: torch.device = model.device
    if device.type != "meta":
        return device
    places: Mapping[str, Any] = model.hf_device_map
    return torch.device(next((place for place in places.values() if place not in _OFFLOADED), "cpu"))


def left_padded(prompts: Sequence[list[int]], device: torch.device | str) -> tuple[Tensor, Tensor, Tensor]:
    """Return token ids, attention mask and position ids, each [rows, t], padded on the left."""
    width = max(map(len, prompts))
    padding = torch.tensor([width - len(prompt) for prompt in prompts])
    tokens = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in prompts])
    mask = (torch.arange(width) >= padding[:, None]).to(torch.long)
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    return tokens.to(device), mask.to(device), positions.to(device)


@contextmanager
def counted_tokens(counter: Callable[[int], None]) -> Iterator[None]:
    """Call `counter` after every forward within the block, with the tokens of all rows that it has read."""
    _COUNTERS.append(counter)
    try:
        yield
    finally:
        _COUNTERS.remove(counter)


class RowEdits(Protocol):
    """Edits of a model that are ready to be applied, one for each trial."""

    def bind(self, trials: Tensor) -> AbstractContextManager[object]:
        """Return a context, to be entered any number of times, in which row i gets the edit of `trials[i]`."""


class RowTrials:
    """Which trial each row of a forward belongs to, with what that means for the forward.

    Rows carry it as they carry their tokens and their cache, and every forward applies it: whoever picks, joins or
    drops rows has no other way to say what they are.

    Attributes:
        trials: Trial of every row, [rows].
        edits: The trials' edits; None: the model as it is.
        prefix: What each trial computes of a prefix that all prompts begin with, None where none is shared.
    """

    def __init__(self, trials: Tensor, edits: RowEdits | None = None, prefix: SharedPrefix | None = None) -> None:
        self.trials, self.edits, self.prefix = trials, edits, prefix
        self._context: AbstractContextManager[object] = nullcontext() if edits is None else edits.bind(trials)

    @classmethod
    def plain(cls, rows: int, device: torch.device | str) -> RowTrials:
        """Return what rows of the unedited model carry."""
        return cls(torch.zeros(rows, dtype=torch.long, device=device))

    def __len__(self) -> int:
        return len(self.trials)

    def pick(self, rows: Tensor) -> RowTrials:
        """Return what these rows carry, by index, [n]."""
        return RowTrials(self.trials[rows], self.edits, self.prefix)

    def applied(self) -> AbstractContextManager[object]:
        """Return a context in which a forward of these rows is edited."""
        return self._context

    @classmethod
    def joined(cls, parts: Sequence[RowTrials]) -> RowTrials:
        """Return what rows of several forwards of the same trials carry, those of the first part first."""
        return cls(torch.cat([part.trials for part in parts]), parts[0].edits, parts[0].prefix)


def read_tokens(model: PreTrainedModel) -> int | None:
    """Return how many tokens of prompts a forward is best given where the model is, None: as many as may be."""
    return READ_TOKENS.get(input_device(model).type)


@torch.inference_mode()
def shared_prefix(model: PreTrainedModel, tokens: list[int], trials: int, edits: RowEdits | None) -> SharedPrefix:
    """Return what a model computes of a prefix under the edits of trials 0 … trials - 1, with one row a trial."""
    device = input_device(model)
    cache = DynamicCache(config=model.config)
    ids, mask, positions = left_padded([tokens] * trials, device)
    _forward(model, RowTrials(torch.arange(trials, device=device), edits), ids, mask, positions, cache)
    return SharedPrefix.of(len(tokens), cache)


@torch.inference_mode()
def first_logits(model: PreTrainedModel, prompts: Sequence[list[int]], rows: RowTrials | None = None) -> Tensor:
    """Return the logits of the first answer token, [rows, vocabulary], float32."""
    return last_logits(model, prompts, 1, rows)[:, -1].to(torch.float32)


@torch.inference_mode()
def last_logits(
    model: PreTrainedModel, prompts: Sequence[list[int]], count: int, rows: RowTrials | None = None
) -> Tensor:
    """Return the logits that the last tokens of every prompt lead to, [rows, count, vocabulary].

    Args:
        model: The model.
        prompts: Token ids of each prompt.
        count: Number of tokens at the end of the prompts.
        rows: The prompts' trials; a prefix that they share leaves at least `count` tokens of each.
    """
    tokens, mask, positions = left_padded(prompts, input_device(model))
    rows = rows or RowTrials.plain(len(prompts), tokens.device)
    if rows.prefix is None:
        return _forward(model, rows, tokens, mask, positions, None, count)
    cache, begin = _on_prefix(model, mask, rows, mask.shape[1]), rows.prefix.length
    return _forward(model, rows, tokens[:, begin:], mask, positions[:, begin:], cache, count)


def _on_prefix(model: PreTrainedModel, mask: Tensor, rows: RowTrials, most: int) -> DynamicCache:
    assert rows.prefix is not None
    width = mask.shape[1]
    return rows.prefix.expanded(model, rows.trials, width - mask.sum(1), width, most)


def _forward(
    model: PreTrainedModel,
    rows: RowTrials,
    tokens: Tensor,
    mask: Tensor,
    positions: Tensor,
    cache: DynamicCache | None,
    count: int = 1,
) -> Tensor:
    """Return the logits of the last tokens, [rows, count, vocabulary], each row under its trial's edit."""
    if len(rows) != len(tokens):
        raise ValueError(f"{len(tokens)} rows with the trials of {len(rows)}")
    given: dict[str, Any] = {"position_ids": positions, "logits_to_keep": count}
    if cache is not None:
        given["past_key_values"] = cache
    known = arguments(model)  # a forward is given only what it has arguments for
    given = {name: value for name, value in given.items() if name in known}
    with rows.applied():
        output = model(input_ids=tokens, attention_mask=mask, use_cache=cache is not None, **given)
    for counter in _COUNTERS:
        counter(tokens.numel())
    logits: Tensor = output.logits[:, -count:]
    return logits
