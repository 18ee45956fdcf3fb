"""One forward of a batch: padding, positions, shared prefixes and the rows' edits."""

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
    """Return the inputs' device: the first weights', or the one that offloaded weights move to."""
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
    """Compiled edits of a model, one per trial."""

    def bind(self, trials: Tensor) -> AbstractContextManager[object]:
        """Return a re-enterable context in which row i gets the edit of `trials[i]`."""


class RowTrials:
    """The trial of each row of a forward, with its edit and prefix.

    It travels with a batch, and every forward applies it. Select, join and drop rows by its methods.

    Attributes:
        trials: Trial of every row, [rows].
        prefix: Every trial's KV cache of the shared prefix, or None.
    """

    def __init__(self, trials: Tensor, edits: RowEdits | None = None, prefix: SharedPrefix | None = None) -> None:
        self.trials, self.edits, self.prefix = trials, edits, prefix
        self._context: AbstractContextManager[object] = nullcontext() if edits is None else edits.bind(trials)

    @classmethod
    def plain(cls, rows: int, device: torch.device | str) -> RowTrials:
        """Return rows of the unedited model."""
        return cls(torch.zeros(rows, dtype=torch.long, device=device))

    def __len__(self) -> int:
        return len(self.trials)

    def pick(self, rows: Tensor) -> RowTrials:
        """Select rows by index, [n]."""
        return RowTrials(self.trials[rows], self.edits, self.prefix)

    def applied(self) -> AbstractContextManager[object]:
        """Return a context in which a forward of these rows is edited."""
        return self._context

    @classmethod
    def joined(cls, parts: Sequence[RowTrials]) -> RowTrials:
        """Concatenate the rows of several forwards of the same trials."""
        return cls(torch.cat([part.trials for part in parts]), parts[0].edits, parts[0].prefix)


def read_tokens(model: PreTrainedModel) -> int | None:
    """Return the prompt tokens per forward that suit the model's device; None: no limit."""
    return READ_TOKENS.get(input_device(model).type)


@torch.inference_mode()
def shared_prefix(model: PreTrainedModel, tokens: list[int], trials: int, edits: RowEdits | None) -> SharedPrefix:
    """Compute a prefix's KV cache under the edits of trials 0 … trials - 1, one row per trial."""
    device = input_device(model)
    cache = DynamicCache(config=model.config)
    ids, mask, positions = left_padded([tokens] * trials, device)
    _forward(model, RowTrials(torch.arange(trials, device=device), edits), ids, mask, positions, cache)
    return SharedPrefix.of(len(tokens), cache)


@torch.inference_mode()
def first_logits(model: PreTrainedModel, prompts: Sequence[list[int]], rows: RowTrials | None = None) -> Tensor:
    """Return the logits of the first response token, [rows, vocabulary], float32."""
    return last_logits(model, prompts, 1, rows)[:, -1].to(torch.float32)


@torch.inference_mode()
def last_logits(
    model: PreTrainedModel, prompts: Sequence[list[int]], count: int, rows: RowTrials | None = None
) -> Tensor:
    """Return the logits at the last `count` tokens of every prompt, after a prefix, [rows, count, vocabulary]."""
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
