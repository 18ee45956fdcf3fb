"""Operations on transformers' KV caches: select rows, join caches, prefill a shared prefix."""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

_MODULE = "transformers.cache_utils"
# Layers that hold only keys and values, one slot per token.
_PLAIN = frozenset({"DynamicLayer", "DynamicSlidingWindowLayer", "DummyLayer"})
# Those, and others whose `reorder_cache` selects rows of their whole state.
_PICKABLE = _PLAIN | {
    "DynamicIndexedLayer",
    "LinearAttentionLayer",
    "LinearAttentionAndFullAttentionLayer",
    "LinearAttentionAndSlidingWindowAttentionLayer",
}


# Tokens of spare room per allocation, and its least share of the tokens held: every operation on keys and values passes
# over the room between rows.
_ROOM, _ROOM_SHARE = 8, 1 / 8


class GrowableKVLayer(DynamicLayer):  # type: ignore[misc]  # transformers has no types
    """Keys and values of a layer with spare room, so that a new token does not copy all earlier ones."""

    _layer_type = None  # not registered as a layer type of transformers' caches

    def __init__(self, most: int) -> None:
        """Allow `most` slots."""
        super().__init__()
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self._most = most

    def update(
        self, key_states: Tensor, value_states: Tensor, *_args: object, **_others: object
    ) -> tuple[Tensor, Tensor]:
        """Append tokens' keys and values, [rows, heads, tokens, width], and return all."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        # Sequential: each may briefly exist twice while it grows.
        self.keys = keys = self._appended(self.keys, key_states)
        self.values = values = self._appended(self.values, value_states)
        return keys, values

    def begin(self, keys: Tensor, values: Tensor) -> None:
        """Start with keys and values, [rows, heads, tokens, width], and the room behind them."""
        self.lazy_initialization(keys, values)
        self.keys, self.values = keys, values

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Select rows, keeping their room."""
        if self.get_seq_length() > 0:
            self.keys = _picked(self.keys, beam_idx)
            self.values = _picked(self.values, beam_idx)

    def _appended(self, held: Tensor | None, new: Tensor) -> Tensor:
        if held is None or held.numel() == 0:
            return new.clone() if _slots(new) > new.shape[-2] else new
        begin, end = held.shape[-2], held.shape[-2] + new.shape[-2]
        if end > _slots(held):
            # Room for decoding only; prompts behind a prefix may already use all memory.
            slots = end if new.shape[-2] > 1 else roomy(end, self._most)
            room = held.new_empty(*held.shape[:-2], slots, held.shape[-1])
            room[..., :begin, :] = held
            held = room
        grown = held.as_strided((*held.shape[:-2], end, held.shape[-1]), held.stride())
        grown[..., begin:, :] = new
        return grown


def roomy(tokens: int, most: int) -> int:
    """Return capacity for `tokens` tokens, capped at `most`."""
    return max(min(tokens + max(_ROOM, int(tokens * _ROOM_SHARE)) - 1, most), tokens)


def _picked(held: Tensor | None, rows: Tensor) -> Tensor:
    assert held is not None
    room = held.new_empty(len(rows), held.shape[1], _slots(held), held.shape[3])[..., : held.shape[2], :]
    return torch.index_select(held, 0, rows.to(held.device), out=room)


def _slots(held: Tensor) -> int:
    """Return the capacity in tokens of keys or values [rows, heads, tokens, width]."""
    rows, heads, tokens, width = held.shape
    slots = held.stride(1) // width
    laid = held.stride() == (heads * slots * width, slots * width, width, 1) and held.storage_offset() == 0
    whole = held.untyped_storage().nbytes() == rows * heads * slots * width * held.itemsize
    return slots if laid and whole else tokens


def new_cache(model: PreTrainedModel, most: int) -> DynamicCache:
    """Return an empty cache for rows of at most `most` tokens."""
    cache = DynamicCache(config=model.config)
    cache.layers = [GrowableKVLayer(most) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


# Weakly cached: inspecting a signature takes longer than an operation of a small model.
_ARGUMENTS: WeakKeyDictionary[PreTrainedModel, frozenset[str]] = WeakKeyDictionary()


def arguments(model: PreTrainedModel) -> frozenset[str]:
    """Return the argument names of a model's forward."""
    if model not in _ARGUMENTS:
        _ARGUMENTS[model] = frozenset(inspect.signature(model.forward).parameters)
    return _ARGUMENTS[model]


def takes_cache(model: PreTrainedModel) -> bool:
    """Return whether a model accepts a DynamicCache; without one it can decode only by its own `generate`."""
    return "past_key_values" in arguments(model) and bool(model._supports_default_dynamic_cache())


def _holds_only(model: PreTrainedModel, kinds: frozenset[str]) -> bool:
    layers = DynamicCache(config=model.config).layers
    return bool(layers) and all(type(x).__module__ == _MODULE and type(x).__name__ in kinds for x in layers)


def rows_can_be_picked(model: PreTrainedModel) -> bool:
    """Return whether rows can be selected from a model's cache, in all of its layers."""
    return _holds_only(model, _PICKABLE)


def writable_slots(model: PreTrainedModel) -> int:
    """Return how many slots of a model's cache can be prefilled from elsewhere; 0: none.

    A recurrent state has no slots. A sliding window drops older tokens, which rows of other lengths would still need.
    """
    if not takes_cache(model) or "position_ids" not in arguments(model) or not _holds_only(model, _PLAIN):
        return 0
    windows = [getattr(layer, "sliding_window", None) for layer in DynamicCache(config=model.config).layers]
    return min((window - 1 for window in windows if window is not None), default=int(1e9))


def common_prefix(prompts: list[list[int]]) -> list[int]:
    """Return the token ids that all prompts begin with; at least one token of each prompt is left over."""
    if not prompts:
        return []
    first, last = min(prompts), max(prompts)
    limit = min(map(len, prompts)) - 1
    length = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), math.inf)
    return first[: int(min(length, limit))]


def joined(model: PreTrainedModel, caches: list[DynamicCache], most: int) -> DynamicCache:
    """Join caches along rows, padding on the left, for up to `most` tokens; the inputs are emptied."""
    cache = new_cache(model, most)
    width = max(one.get_seq_length() for one in caches)
    for index, layer in enumerate(caches[0].layers):
        if getattr(layer, "keys", None) is None:
            continue
        room = roomy(width, most) if isinstance(cache.layers[index], GrowableKVLayer) else width
        keys = _join_rows([_take_tensor(one.layers[index], "keys") for one in caches], width, room)
        values = _join_rows([_take_tensor(one.layers[index], "values") for one in caches], width, room)
        _begin(cache, index, keys, values)
    return cache


def copied_rows(model: PreTrainedModel, cache: DynamicCache, rows: int) -> DynamicCache:
    """Return a cache that holds the only row of another one `rows` times, differentiably."""
    copied = DynamicCache(config=model.config)
    for index, layer in enumerate(cache.layers):
        if getattr(layer, "keys", None) is not None:
            copied.layers[index].update(*(held.expand(rows, -1, -1, -1) for held in (layer.keys, layer.values)))
    return copied


def _begin(cache: DynamicCache, index: int, keys: Tensor, values: Tensor) -> None:
    layer = cache.layers[index]
    if isinstance(layer, GrowableKVLayer):
        layer.begin(keys, values)
    else:
        layer.update(keys, values)


def _take_tensor(layer: Any, name: str) -> Tensor:
    """Take a layer's keys or values out of it."""
    tensor: Tensor = getattr(layer, name)
    setattr(layer, name, None)
    return tensor


def _join_rows(tensors: list[Tensor], width: int, room: int) -> Tensor:
    """Join keys or values [rows, heads, slots, head width] along rows, right-aligned, emptying the list."""
    rows = sum(map(len, tensors))
    found = tensors[0].new_empty(rows, tensors[0].shape[1], room, tensors[0].shape[3])[..., :width, :]
    while tensors:
        rows -= len(tensors[-1])
        tensor = tensors.pop()
        padding = width - tensor.shape[2]
        # Masked values may be anything but NaN.
        found[rows : rows + len(tensor), :, :padding] = 0
        found[rows : rows + len(tensor), :, padding:] = tensor
    return found


@dataclass(frozen=True)
class SharedPrefix:
    """KV cache of a common prefix, computed once per trial.

    Attributes:
        layers: Keys and values of each layer, [trials, heads, length, width]; None for a layer without.
    """

    length: int
    layers: tuple[tuple[Tensor, Tensor] | None, ...]

    @classmethod
    def of(cls, length: int, cache: DynamicCache) -> SharedPrefix:
        """Take keys and values out of a cache that holds a prefix."""
        kept = [(x.keys, x.values) if getattr(x, "keys", None) is not None else None for x in cache.layers]
        return cls(length, tuple(kept))

    def expanded(self, model: PreTrainedModel, trials: Tensor, padding: Tensor, width: int, most: int) -> DynamicCache:
        """Return a cache as if left-padded rows had been forwarded up to slot `length`.

        Slots and positions are those of the whole rows: a row with padding p holds its first length - p tokens, and the
        rest of the prefix is still to be forwarded.

        Args:
            model: The model.
            trials: Trial of every row, [rows].
            padding: Padding of every row in slots, [rows].
            width: Slots of the rows at their ends.
            most: Most tokens of a row.
        """
        cache = new_cache(model, most)
        # Build each padding of a trial once, then copy whole rows: there are few paddings.
        paddings, which = torch.unique(padding, return_inverse=True)
        row = trials * len(paddings) + which
        # Padding is masked, so its content does not matter.
        slot = (torch.arange(self.length, device=padding.device) - paddings[:, None]).clamp_min(0)
        for index, layer in enumerate(self.layers):
            if layer is not None:
                room = width if isinstance(cache.layers[index], GrowableKVLayer) else self.length
                keys, values = (_spread(held, slot.to(held.device), row.to(held.device), room) for held in layer)
                _begin(cache, index, keys, values)
        return cache


def _spread(held: Tensor, slots: Tensor, rows: Tensor, room: int) -> Tensor:
    """Return keys or values of every row, [rows, heads, n, width], with `room` slots.

    `held` [trials, heads, length, width] is indexed by `slots` [p, n], for p paddings, and `rows` [rows] of trial * p +
    padding.
    """
    ways = held[:, :, slots].transpose(1, 2).flatten(0, 1)  # [trials * p, heads, n, width]
    found = held.new_empty(len(rows), held.shape[1], room, held.shape[3])[..., : slots.shape[1], :]
    return torch.index_select(ways, 0, rows, out=found)
