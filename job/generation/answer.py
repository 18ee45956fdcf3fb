"""A greedily decoded response."""

from __future__ import annotations

import math
from dataclasses import dataclass, field


@dataclass
class Answer:
    """A greedily decoded answer.

    Attributes:
        tokens: Its token ids without the end token.
        margins: For each step, the end included, how far the best logit was above the second.
        opening: Log-odds of the opening that was asked for, at the first step; nan if none was.
        decided: It was ended because it told all that the caller wanted to know.
    """

    tokens: list[int] = field(default_factory=list)
    margins: list[float] = field(default_factory=list)
    opening: float = math.nan
    decided: bool = False
