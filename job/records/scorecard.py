"""How a model answers, counted: the parts of a scorecard."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from job.records.base import Record
from job.records.finalists import KLSpread

Outcome = Literal["answered", "evaded", "refused", "broken"]
ScoredPrompts = Literal["bad", "good", "over-refusal"]
OUTCOMES: tuple[Outcome, ...] = ("answered", "evaded", "refused", "broken")
Column = Literal["category", "language"]
# Columns of a prompt file by which responses are counted, and the longest name of a group.
COLUMNS: tuple[Column, ...] = ("category", "language")
LONGEST_GROUP = 64


class Outcomes(Record):
    """One model's responses to one kind of prompts; each response counts once.

    Attributes:
        column: The prompts' column that the group is of; None: all prompts.
        group: The column's value that all prompts of the group have, "" for all prompts.
        broken: Responses that are broken and no refusals.
        evaded: Responses that turn away without a refusal marker and are not broken.
        empty: Responses without text; they count as broken.
    """

    prompts: ScoredPrompts
    column: Column | None = None
    group: str = Field("", max_length=LONGEST_GROUP, pattern=r"^[^\x00-\x1f]*$")
    answered: int = Field(ge=0)
    evaded: int = Field(ge=0)
    refused: int = Field(ge=0)
    broken: int = Field(ge=0)
    empty: int = Field(ge=0)

    @property
    def responses(self) -> int:
        """The number of prompts."""
        return self.answered + self.evaded + self.refused + self.broken


class Thinking(Record):
    """One model's responses with thinking on, to all prompts.

    Attributes:
        limit: Longest response in tokens, its thought included.
        thoughts: Responses with a chain of thought.
        unfinished: Thoughts that do not end within the limit: their answer is empty.
        median: Median length of the thoughts in tokens; unfinished ones count as far as they go.
        ninetieth: Nine tenths of the thoughts have at most this length.
        outcomes: What follows the thoughts, by outcome, as in figures; not tested for incoherence.
    """

    limit: int = Field(ge=1)
    responses: int = Field(ge=0)
    thoughts: int = Field(ge=0)
    unfinished: int = Field(ge=0)
    median: int = Field(ge=0)
    ninetieth: int = Field(ge=0)
    outcomes: tuple[Outcomes, ...]


class KLFigures(Record):
    """KL divergence from the base model in nats over the good prompts, with its 95 % interval.

    It is the mean over the first `tokens` positions of the base model's own responses.
    """

    tokens: int = Field(ge=1)
    mean: float
    interval: tuple[float, float]
    spread: KLSpread
