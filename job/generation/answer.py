"""A greedily decoded response."""

from __future__ import annotations

import math
from dataclasses import dataclass, field


@dataclass
class Answer:
    """A greedily decoded response.

    Attributes:
        tokens: Token ids without the end token.
        margins: Per step, end included, the best logit minus the second best.
        opening: Log-odds of the requested opening at the first step; nan without one.
        decided: Whether the caller stopped it early.
        finite: False where logits were not finite; the response ends before that token.
    """

    tokens: list[int] = field(default_factory=list)
    margins: list[float] = field(default_factory=list)
    opening: float = math.nan
    decided: bool = False
    finite: bool = True
