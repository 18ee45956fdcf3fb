"""How the models of a family can be batched, cached and given a shared prefix."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class BatchingSupport:
    """How the models of a family can be read; most in every way.

    Attributes:
        padded: Rows of several lengths may stand in one forward: padding does not matter to what they say.
        cached: A token can be decoded on what was kept of those before it; else all are read again.
        shared: What rows begin with can be read once for all of them: it does not depend on what follows.
    """

    padded: bool = True
    cached: bool = True
    shared: bool = True

    def chunks(
        self, prompts: Sequence[list[int]], rows: int, positions: int = 1, tokens: int | None = None
    ) -> Iterator[list[list[int]]]:
        """Yield prompts, in order, in what one forward takes.

        Args:
            prompts: Token ids of each prompt, the shortest first.
            rows: Prompts in one forward at most.
            positions: Of how many positions a row logits are wanted; continuations of one length are not always.
            tokens: Tokens in one forward at most, padding included, unless one prompt has more; None: no such bound.
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
