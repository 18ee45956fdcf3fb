"""KL divergence in words: one scale for reports, cards and output."""

from __future__ import annotations

import math

# Upper end of each step in nats, and its words.
_STEPS = (
    (0.001, "practically the same"),
    (0.01, "slightly changed"),
    (0.1, "moderately changed"),
    (1.0, "strongly changed"),
    (math.inf, "severely changed"),
)


def moved_share(kl: float) -> float:
    """Bound the share of a token's probability that moved, for a divergence in nats.

    The smaller of Pinsker's bound √(KL/2) and Bretagnolle and Huber's √(1 − e^−KL) on the total variation. Both are
    concave in the divergence, so they hold for means over prompts, too.
    """
    known = max(kl, 0.0)
    return min(math.sqrt(known / 2), math.sqrt(-math.expm1(-known)))


def kl_in_words(kl: float) -> str:
    """Return a divergence's step on the scale: "slightly changed"."""
    return next(words for most, words in _STEPS if kl < most or most == math.inf)


def kl_with_bound(kl: float) -> str:
    """Return a divergence's step and bound: "slightly changed: at most 5 % of a token's probability moved"."""
    return f"{kl_in_words(kl)}: at most {100 * moved_share(kl):.2g} % of a token's probability moved"


def kl_scale() -> list[tuple[str, str, str]]:
    """Return the scale as a table: range, words and bound; the first row is the head."""
    rows, low = [("KL (nats)", "responses are", "of a token's probability moved")], 0.0
    for most, words in _STEPS:
        told = f"{low:g} and more" if most == math.inf else f"under {most:g}" if not low else f"{low:g} to {most:g}"
        bound = "up to all" if most == math.inf else f"at most {100 * moved_share(most):.2g} %"
        rows.append((told, words, bound))
        low = most
    return rows
