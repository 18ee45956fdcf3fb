"""Memory of the descent: what one prompt keeps for the backward pass, and how many prompts a forward reads.

The weights are frozen, so linear maps save nothing. A layer saves per token, with hidden size h, intermediate size i
and b bytes a number of the loaded type, where 4 bytes mean that the code computes in float32:

- each norm's input, 2 · 4h, and each edited output, 2 · 4h; with "full" twice that for the outputs;
- gate, its activation and up, 3bi; with "column" also the down-projection's input, 4i;
- queries, response, keys and values repeated for all heads, and the mask as numbers: in all layers but the first, whose
  attention comes before the first edit;
- a distribution and its logarithm for each position of a response: 2 · 4 · vocabulary.

A prefix that all prompts share is read once, so the rows of a batch keep less than that.

Beside them lie, once a forward, the weights in float64 that "full" and "column" multiply with the directions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from job.gradient.recipe import Recipe
from job.preflight.checks import Check, size
from job.preflight.device_map import CONTEXT_BYTES, RAM_SHARE, DevicePlan
from job.preflight.model_facts import ModelFacts
from job.records import Record

Mode = Literal["none", "pre", "full", "column"]

# Usable share of a GPU's free memory; the allocator loses some.
GPU_SHARE = 0.9
# Tensors of logits size, float32, that the loss holds at its peak; two of them are saved for the backward.
_LOSS_TABLES, _SAVED_TABLES = 7, 2


class DescentRow(Record):
    """One prompt of a forward of the descent.

    Attributes:
        tokens: Tokens read: the prompt, and the response without its last token.
        answer_tokens: Response tokens whose logits the loss reads.
        dtype_bytes: Bytes per number in the loaded type.
        mode: ablation.row_normalization.
    """

    tokens: int
    answer_tokens: int = Recipe().kl_tokens
    dtype_bytes: int = 2
    mode: Mode = "none"

    @classmethod
    def longest(cls, prompt_tokens: int, dtype_bytes: int, mode: Mode) -> DescentRow:
        """Return the row of a prompt of this many tokens."""
        recipe = Recipe()
        return cls(tokens=prompt_tokens + recipe.kl_tokens - 1, dtype_bytes=dtype_bytes, mode=mode)


class GradientPlan(Record):
    """The descent's memory.

    Attributes:
        rows: Prompts per forward; 0: not even one fits.
        row_bytes: Peak bytes of one prompt, on the device where they are most.
        fault: Why there will be no descent, None if there will be one.
    """

    rows: int
    row_bytes: int
    fault: str | None = None


def saved_bytes(facts: ModelFacts, row: DescentRow, layers: range | None = None) -> int:
    """Return the bytes that one row keeps for the backward, in some or all layers."""
    chosen = range(facts.layers) if layers is None else layers
    attending = len(chosen) - (0 in chosen)
    per_token = len(chosen) * (_hidden(facts, row) + _mlp(facts, row)) + attending * _attention(facts, row)
    if row.mode == "column":  # in float32 a layer's attention has saved that already
        copied = len(chosen) if row.dtype_bytes < 4 else len(chosen) - attending
        per_token += copied * 4 * facts.heads * facts.value_dim
    return row.tokens * per_token


def peak_bytes(facts: ModelFacts, row: DescentRow, layers: range | None = None) -> int:
    """Return the peak of one row: what it keeps, and the larger of the loss and a layer's backward."""
    width = (facts.experts_per_token or 1) * facts.intermediate
    # Gradients of gate, activation and up; of the stream and a norm's input in float32.
    backward = row.tokens * (3 * width * row.dtype_bytes + 2 * 4 * facts.hidden)
    table = row.answer_tokens * facts.vocab * 4
    loss = max(_LOSS_TABLES * table, _SAVED_TABLES * table + backward)
    return saved_bytes(facts, row, layers) + loss


def weight_bytes(facts: ModelFacts, mode: Mode, layers: range | None = None) -> int:
    """Return the bytes of weights kept in float64 for the directions' gradients, whatever the rows."""
    if mode not in ("full", "column"):
        return 0
    count = facts.layers if layers is None else len(layers)
    return count * 8 * facts.hidden * (facts.heads * facts.value_dim + facts.intermediate)


def probe_bytes(facts: ModelFacts, row: DescentRow, layers: range | None = None) -> int:
    """Return the peak of one row alone: the descent counts that for every row, also what rows share."""
    return peak_bytes(facts, row, layers) + weight_bytes(facts, row.mode, layers)


def gradient_plan(
    facts: ModelFacts, devices: Sequence[DevicePlan], row: DescentRow, *, offloaded: bool
) -> GradientPlan:
    """Return how many prompts a forward of the descent reads: 24, halved until they fit, as before its first step."""
    if offloaded:
        return GradientPlan(rows=0, row_bytes=peak_bytes(facts, row), fault="weights are offloaded")
    rows, start, largest = Recipe().batch, 0, 0
    for device in devices:
        layers = range(start, start + device.layers)
        start = layers.stop
        taken = probe_bytes(facts, row, layers)
        largest = max(largest, taken)
        context, share = (0, RAM_SHARE) if device.device == "cpu" else (CONTEXT_BYTES, GPU_SHARE)
        room = share * (device.free - device.weights - device.tables - context)
        while rows and rows * taken > room:
            rows //= 2
        if not rows and device.device != "cpu" and taken * GPU_SHARE <= room:
            rows = 1  # a GPU's probe of one prompt fails only if memory runs out
    fault = None if rows else f"gradients of one prompt take {size(largest)}, more than the free memory"
    return GradientPlan(rows=rows, row_bytes=largest, fault=fault)


def gradient_check(found: GradientPlan, asked: str) -> Check:
    """Report how many prompts fit; without any, the search uses TPE or, if gradients were demanded, cannot."""
    needed = "one prompt's gradients within the free memory beside the weights"
    if found.fault is None:
        measured = f"{found.rows} prompts a forward pass of the gradient descent, {size(found.row_bytes)} each"
        return Check(name="gpu.gradient", status="ok", measured=measured, needed=needed)
    falls_back = asked == "auto" or found.fault == "weights are offloaded"
    then = "the search will use TPE" if falls_back else "the job will stop before its search"
    return Check(
        name="gpu.gradient",
        status="warn",
        measured=f"{found.fault}: {then}",
        needed=needed,
        remedy="choose more memory, or " + ("accept more trials" if falls_back else "set search.method=auto"),
    )


def _hidden(facts: ModelFacts, row: DescentRow) -> int:
    """Bytes per token of a layer's two norms and two edited outputs."""
    return 4 * facts.hidden * (6 if row.mode == "full" else 4)


def _mlp(facts: ModelFacts, row: DescentRow) -> int:
    """Bytes per token of gate, activation and up; each expert's copy of a token and its weighted output."""
    experts = facts.experts_per_token or 1
    width = experts * facts.intermediate
    copies = experts * facts.hidden * row.dtype_bytes if facts.experts else 0
    return 3 * width * row.dtype_bytes + copies + (4 * width if row.mode == "column" else 0)


def _attention(facts: ModelFacts, row: DescentRow) -> int:
    """Bytes per token of attention; a row of its mask and a normaliser for every head among them."""
    heads = 2 * facts.heads * (facts.head_dim + facts.value_dim) * row.dtype_bytes
    normed = 4 * (facts.heads + facts.kv_heads) * facts.head_dim if facts.query_norm else 0
    return heads + normed + row.tokens * row.dtype_bytes + 4 * facts.heads
