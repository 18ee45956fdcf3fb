"""A scorer that looks for exclamation marks, as an objective of the search and a detector of the report.

pip install ./examples/scorer
abliterate run MODEL --set 'search.objectives=["exclamations", "kl"]'
"""

from __future__ import annotations

from collections.abc import Sequence

from job.scoring.broken import Exchange
from job.scoring.detectors import Context, Scorer


def make_scorer(context: Context) -> Scorer:
    """Return the scorer; `context` holds the job's settings."""

    def score(exchanges: Sequence[Exchange]) -> list[float]:
        # From 0 to 1; 0.5 and more counts: one exclamation mark is 1/2, two are 2/3.
        marks = [exchange.answer.count("!") for exchange in exchanges]
        return [count / (count + 1) for count in marks]

    return score


# Used unless the objective says otherwise, as in "exclamations@bad:more".
make_scorer.prompts = "both"
make_scorer.direction = "fewer"
