"""Memory of a forward besides weights: KV cache and activations, derived from the code.

The stages follow transformers' decoder layers and `job.generation.greedy` line by line; tests compare them with all
tensors alive during real decoding.
"""

from __future__ import annotations

from typing import Literal

from job.preflight.model_facts import ModelFacts
from job.records import Record

Edits = Literal["none", "outputs", "columns"]


class Batch(Record):
    """Rows decoded together.

    Attributes:
        prompt_tokens: Tokens of the longest prompt, to which all are padded.
        read_tokens: Most prompt tokens per prefill forward; None: no limit.
    """

    rows: int
    prompt_tokens: int
    answer_tokens: int
    read_tokens: int | None = None

    @property
    def rows_read(self) -> int:
        """Rows per prefill forward."""
        together = self.rows if self.read_tokens is None else self.read_tokens // self.prompt_tokens
        return min(self.rows, max(together, 1))

    @property
    def tokens(self) -> int:
        """Tokens per row with keys and values at the end; the last token's are never computed."""
        return self.prompt_tokens + max(self.answer_tokens - 1, 0)


def cache_bytes(facts: ModelFacts, batch: Batch, dtype_bytes: int, layers: range | None = None) -> int:
    """Return the KV cache's bytes at the end of decoding, for some or all layers.

    A sliding layer keeps its window, and the whole prompt until the next token is decoded.
    """
    width = facts.kv_heads * (facts.head_dim + facts.value_dim)
    tokens = 0
    for window in facts.sliding if layers is None else facts.sliding[layers.start : layers.stop]:
        kept = batch.tokens if window is None else min(batch.tokens, window)
        tokens += max(kept, batch.prompt_tokens) if batch.answer_tokens <= 1 else kept
    return batch.rows * tokens * width * dtype_bytes


def activation_bytes(
    facts: ModelFacts, batch: Batch, dtype_bytes: int, *, edits: Edits = "none", layers: range | None = None
) -> int:
    """Return peak decoding bytes besides weights and final cache; `edits` "columns" also scales inputs."""
    beginning = batch.model_copy(update={"answer_tokens": 1})
    full, begun = (cache_bytes(facts, one, dtype_bytes, layers) for one in (batch, beginning))
    prefill = begun + _prefill_bytes(facts, batch, dtype_bytes, edits)
    if batch.rows_read < batch.rows:  # parts of one layer are put together while those of the others are still there
        prefill = max(prefill, begun + begun // max(facts.layers if layers is None else len(layers), 1))
    return max(prefill, full + _decoding_bytes(facts, batch, dtype_bytes)) - full


def scoring_bytes(facts: ModelFacts, rows: int, dtype_bytes: int) -> int:
    """Return the bytes to compare first-token distributions: logits and three float32 vocabulary tables."""
    return rows * facts.vocab * (dtype_bytes + 3 * 4)


def _prefill_bytes(facts: ModelFacts, batch: Batch, dtype_bytes: int, edits: Edits) -> int:
    stages = [_norms(facts, dtype_bytes), _attention(facts, batch, dtype_bytes), _mlp(facts, dtype_bytes)]
    if edits != "none":
        stages.append(_edit(facts, dtype_bytes))
    if edits == "columns":
        stages.append(_scaled_input(facts, dtype_bytes))
    # Ids, mask and positions; cosines and sines; a row of the mask that attention is given.
    shared = 3 * 8 + 2 * facts.head_dim * dtype_bytes + batch.prompt_tokens
    layers = batch.rows_read * batch.prompt_tokens * (max(stages) + shared)
    copy = 0 if dtype_bytes == 4 else 4
    return max(layers, batch.rows_read * facts.vocab * (dtype_bytes + copy))


def _norms(facts: ModelFacts, dtype_bytes: int) -> int:
    """Bytes per token: embeddings, layer input, residual stream; float32 copy, its product, the result."""
    computed = 8 if dtype_bytes < 4 else 2 * dtype_bytes
    return facts.hidden * (3 * dtype_bytes + computed)


def _attention(facts: ModelFacts, batch: Batch, dtype_bytes: int) -> int:
    """Bytes per token: embeddings, layer input, normed input; queries during rotation or attention."""
    queries = facts.heads * facts.head_dim
    # Queries, two products and the half-turned copy.
    rotated = 4 * queries * dtype_bytes
    normed = queries * (dtype_bytes + 8) if facts.query_norm else 0
    # Queries, answer, keys and values repeated for all heads, the mask as numbers.
    repeated = 0 if facts.kv_heads == facts.heads else 2 * queries
    attended = (2 * queries + repeated + batch.prompt_tokens) * dtype_bytes
    return 3 * facts.hidden * dtype_bytes + max(rotated, normed, attended)


def _mlp(facts: ModelFacts, dtype_bytes: int) -> int:
    """Bytes per token: embeddings, layer input, residual stream, normed input; gate, up and their product."""
    experts = facts.experts_per_token or 1
    # Each expert is handed its own copy of a token and returns one.
    copies = 2 * experts * facts.hidden if facts.experts else 0
    return dtype_bytes * (4 * facts.hidden + 3 * experts * facts.intermediate + copies)


def _edit(facts: ModelFacts, dtype_bytes: int) -> int:
    """Bytes per token: as before the MLP, its down-projection's input and output, and float32 copies of that."""
    width = (facts.experts_per_token or 1) * facts.intermediate
    # The output, what is taken from it and the difference; the output itself where it is float32 already.
    copies = 12 if dtype_bytes < 4 else 8
    return dtype_bytes * (5 * facts.hidden + width) + copies * facts.hidden


def _scaled_input(facts: ModelFacts, dtype_bytes: int) -> int:
    """Bytes per token: as before the MLP, its down-projection's input, that in float32 and scaled."""
    width = (facts.experts_per_token or 1) * facts.intermediate
    return dtype_bytes * 4 * facts.hidden + width * (dtype_bytes + (8 if dtype_bytes < 4 else 4))


def _decoding_bytes(facts: ModelFacts, batch: Batch, dtype_bytes: int) -> int:
    """Return the bytes of a step: a layer's growing cache is copied, or the logits exist."""
    if batch.answer_tokens <= 1:
        return 0
    appended = batch.tokens * facts.kv_heads * facts.value_dim * dtype_bytes
    # Beside it one token's embedding, layer input, normed input, and its queries before and after rotation.
    appended += (3 * facts.hidden + 2 * facts.heads * facts.head_dim) * dtype_bytes
    # As computed and, where they are not that already, as float32.
    logits = facts.vocab * (dtype_bytes + 4 if dtype_bytes < 4 else dtype_bytes)
    # Padding mask before and after it grows, and as attention is given it.
    return batch.rows * (max(appended, _mlp(facts, dtype_bytes), logits) + batch.tokens * 17)
