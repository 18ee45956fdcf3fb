"""Batching, caching and prefix sharing that a model family supports."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class BatchingSupport:
    """Support of a model family for batching.

    Attributes:
        padded: Rows of different lengths can share a forward; padding does not change results.
        cached: Decoding can use a KV cache; otherwise the whole sequence is recomputed per token.
        shared: A common prefix can be computed once for all rows.
    """

    padded: bool = True
    cached: bool = True
    shared: bool = True

    def chunks(
        self, prompts: Sequence[list[int]], rows: int, positions: int = 1, tokens: int | None = None
    ) -> Iterator[list[list[int]]]:
        """Yield prompts (token ids), shortest first, in batches of one forward.

        A batch has at most `rows` prompts and `tokens` tokens, padding included (None: no limit); a longer prompt gets
        its own. With logits at more than one of the last `positions`, continuations may differ in length.
        """
        chunk: list[list[int]] = []
        for prompt in prompts:
            alike = self.padded or (positions == 1 and all(len(prompt) == len(other) for other in chunk))
            full = len(chunk) == rows or (tokens is not None and (len(chunk) + 1) * len(prompt) > tokens)
            if chunk and (full or not alike):
                yield chunk
                chunk = []
            chunk.append(prompt)
        if chunk:
            yield chunk
