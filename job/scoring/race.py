"""Races of trials: one that certainly cannot join the front is not answered to the end."""

from __future__ import annotations

from dataclasses import dataclass

# Below this a projected count says too little to the sampler. A tenth decides most trials (docs/lab-notes/speed.md).
_FEWEST, _PARTS = 10, 10


def first_round(prompts: int) -> int:
    """Return how many of the bad prompts are answered first; 0 if there are too few for a race."""
    first = max(_FEWEST, prompts // _PARTS)
    return first if 2 * first <= prompts else 0


@dataclass(frozen=True)
class Race:
    """What the trials of a batch compete with.

    Attributes:
        first: Number of bad prompts that are answered first.
        rivals: Unanswered prompts and KL divergence of the trials on the front.
    """

    first: int
    rivals: tuple[tuple[int, float], ...]

    def parts(self, prompts: int) -> tuple[list[int], list[int]]:
        """Return the indices of the prompts answered first, spread over all, and those of the others."""
        first = [index * prompts // self.first for index in range(self.first)]
        return first, sorted(set(range(prompts)) - set(first))

    def beaten(self, kl: float) -> bool:
        """Return whether a trial may lose, by its KL divergence."""
        return any(least <= kl for _, least in self.rivals)

    def lost(self, unanswered: int, kl: float) -> bool:
        """Return whether a rival is at least as good, however the other prompts are answered: counts only grow."""
        return any(fewest <= unanswered and least <= kl for fewest, least in self.rivals)
