"""Measurements by `abliterate evaluate` that cards and reports show as well."""

from __future__ import annotations

import math
from typing import Literal

from job.records.base import Record


class Reading(Record):
    """How a measured model's weights were stored and read; kept for all but plain weights.

    Attributes:
        form: "gguf", "bnb-4bit", "bnb-8bit", or the method that config.json names.
        types: Number of tensors by their type in the file.
        sha256: Hashes of the weight files.
        note: What the figures hold for, in a sentence.
    """

    form: str
    types: dict[str, int]
    sha256: dict[str, str]
    note: str


class Score(Record):
    """A benchmark metric of both models, with standard errors or None.

    Attributes:
        items: Number of documents that both models answered, None if the metric is not a mean over documents.
        better: Documents on which the edited model scores higher.
        worse: Those on which it scores lower.
        change_interval: 95 % interval of the mean difference over the documents.
    """

    task: str
    metric: str
    base: float
    base_error: float | None
    edited: float
    edited_error: float | None
    items: int | None = None
    better: int = 0
    worse: int = 0
    change_interval: tuple[float, float] | None = None

    @property
    def change(self) -> float:
        """The edited model's score less the base model's."""
        return self.edited - self.base

    @property
    def change_error(self) -> float | None:
        """Standard error of the change for independent documents; the true one is smaller."""
        if self.base_error is None or self.edited_error is None:
            return None
        return math.hypot(self.base_error, self.edited_error)


class Benchmarks(Record):
    """Benchmark scores of a trial's edit, kept for its card and reports."""

    version: Literal[1] = 1
    lm_eval: str
    scores: tuple[Score, ...]
