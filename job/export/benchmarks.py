"""Benchmark scores as rows of a table, for cards and reports."""

from __future__ import annotations

from collections.abc import Sequence

from job.records.evaluation import Score

CAPTION = "Benchmarks by lm-eval; a change has its 95 % interval over the documents, which both models answered"


def benchmark_rows(scores: Sequence[Score]) -> list[tuple[str, ...]]:
    """Return both models' scores and the change; without scores by document, the standard error of the change."""
    return [
        ("benchmark", "metric", "documents", "base model", "edited model", "change", "better", "worse"),
        *(_row(score) for score in scores),
    ]


def _row(score: Score) -> tuple[str, ...]:
    if score.change_interval is None:
        error = "" if score.change_error is None else f" ± {score.change_error:.2g} (standard error, unpaired)"
        numbers, change, counts = "–", f"{score.change:+.4g}{error}", ("–", "–")
    else:
        low, high = score.change_interval
        numbers, change = str(score.items), f"{score.change:+.4g} ({low:+.4g} to {high:+.4g})"
        counts = str(score.better), str(score.worse)
    return (score.task, score.metric, numbers, f"{score.base:.4g}", f"{score.edited:.4g}", change, *counts)
