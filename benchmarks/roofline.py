"""Lower bound on the cost of forwards: operations and bytes, against ceilings measured on the device.

Operations are those of all rows that ran, padding included. Bytes must come from memory whatever the implementation:
the weights once per forward, and the cached keys and values. Activations are assumed to stay in the caches, so losses
there show as a smaller share of the roofline.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from benchmarks.measuring import Clock
from job.preflight.activation_memory import Batch, cache_bytes
from job.preflight.estimate import Work
from job.preflight.model_facts import ModelFacts

# Enough work to fill the units, short on a CPU; bytes far beyond any cache.
_TOKENS = {"cuda": 8192, "cpu": 1024}
_BYTES = {"cuda": 4 << 30, "cpu": 1 << 29}
_AT_ONCE = {"cuda": 8, "cpu": 1}
_SECONDS = 0.5


@dataclass
class Forward:
    """One recorded forward.

    Attributes:
        rows: Batch size.
        tokens: Tokens computed per row, padding included.
        context: Slots that each token attends to.
        cached: Whether keys and values were kept.
        positions: Positions with logits, over all rows.
    """

    rows: int
    tokens: int
    context: int
    cached: bool
    positions: int = 0

    def flops(self, facts: ModelFacts) -> int:
        """Return its operations: a multiplication and an addition per weight and token."""
        head = (facts.head if facts.head.cast else facts.embedding).cast
        computed = self.rows * self.tokens
        attended = facts.layers * facts.heads * (facts.head_dim + facts.value_dim) * self.context
        return 2 * (computed * (facts.active_parameters - head + attended) + self.positions * head)

    def bytes(self, facts: ModelFacts, dtype_bytes: int) -> int:
        """Return the minimum bytes read; of a mixture of experts all weights, true beyond a few tokens."""
        head = facts.head if facts.head.cast else facts.embedding
        weights = sum(part.bytes(dtype_bytes) for part in facts.layer_weights)
        weights += head.bytes(dtype_bytes) if self.positions else 0
        kept = Batch(rows=self.rows, prompt_tokens=self.context, answer_tokens=1)
        return weights + (cache_bytes(facts, kept, dtype_bytes) if self.cached else 0)


@contextmanager
def recorded(model: PreTrainedModel) -> Iterator[list[Forward]]:
    """Record every forward of a model within the block."""
    forwards: list[Forward] = []

    def begin(_module: nn.Module, _inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        rows, tokens = named["input_ids"].shape
        cached = named.get("past_key_values") is not None
        forwards.append(Forward(rows, tokens, named["attention_mask"].shape[-1], cached))

    def head(_module: nn.Module, _inputs: tuple[Any, ...], logits: Tensor) -> None:
        forwards[-1].positions = logits.shape[:-1].numel()

    handles = [
        model.get_decoder().register_forward_pre_hook(begin, with_kwargs=True),
        model.get_output_embeddings().register_forward_hook(head),
    ]
    try:
        yield forwards
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class Ceilings:
    """Measured maximum rates of a device.

    Attributes:
        flops: Matrix products of the model's own shapes and dtype, operations a second.
        bandwidth: Reading or copying memory, whichever is faster, bytes a second.
    """

    flops: float
    bandwidth: float


def measured_ceilings(facts: ModelFacts, device: torch.device, dtype: torch.dtype) -> Ceilings:
    """Return a device's ceilings for a model: the best rate over its layers' products."""
    wide = facts.heads * facts.head_dim
    shapes = {(facts.hidden, facts.intermediate), (facts.intermediate, facts.hidden), (wide, facts.hidden)}
    rates = [_product_rate(*shape, device, dtype) for shape in sorted(shapes)]
    found = Ceilings(max(rates), max(_copy_rate(device), _read_rate(device)))
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return found


def _product_rate(inputs: int, outputs: int, device: torch.device, dtype: torch.dtype) -> float:
    # Random numbers: a GPU multiplies zeros and ones with less power, and so faster.
    tokens = _TOKENS[device.type]
    x, weight = (torch.randn(count, inputs, device=device, dtype=dtype) for count in (tokens, outputs))
    return 2 * tokens * inputs * outputs / _least_time(lambda: nn.functional.linear(x, weight), device)


def _copy_rate(device: torch.device) -> float:
    source = torch.ones(_BYTES[device.type] // 8, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _least_time(lambda: target.copy_(source), device)


def _read_rate(device: torch.device) -> float:
    source = torch.ones(_BYTES[device.type] // 4, device=device)
    return source.nbytes / _least_time(source.sum, device)


def _least_time(action: Callable[[], object], device: torch.device) -> float:
    """Return an action's minimum duration in seconds: a ceiling is the undisturbed device."""
    clock, begin = Clock(device), time.perf_counter()
    found: list[float] = []
    while len(found) < 3 or time.perf_counter() - begin < _SECONDS:
        # Several before each wait, so that waiting for the device does not count as its work.
        found.append(clock.times(lambda: [action() for _ in range(_AT_ONCE[device.type])]).seconds)
    return max(min(found), 1e-9) / _AT_ONCE[device.type]


@dataclass(frozen=True)
class Roofline:
    """Lower bound on a phase's cost.

    Attributes:
        flops: Operations.
        bytes: Bytes that come from memory.
        arithmetic_s: Duration of the operations at the ceiling.
        memory_s: Duration of the transfers at the ceiling.
        seconds: The sum over all forwards of the larger of the two.
    """

    flops: float
    bytes: float
    arithmetic_s: float
    memory_s: float
    seconds: float


def roofline(works: Sequence[Work], ceilings: Ceilings) -> Roofline:
    """Return the lower bound for a sequence of work."""
    flops, size = (math.fsum(getattr(work, name) for work in works) for name in ("flops", "bytes"))
    least = math.fsum(work.seconds(ceilings.flops, ceilings.bandwidth) for work in works)
    return Roofline(flops, size, flops / ceilings.flops, size / ceilings.bandwidth, least)


def works(forwards: Sequence[Forward], facts: ModelFacts, dtype_bytes: int) -> list[Work]:
    """Return the work of forwards."""
    return [Work(flops=one.flops(facts), bytes=one.bytes(facts, dtype_bytes)) for one in forwards]
