"""Results of `abliterate evaluate`: the base and the edited model side by side. Needs no torch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Literal

from pydantic import Field

from job.export.scorecard import group_rows, scorecard_rows, thinking_rows
from job.numerics.statistics import difference_interval, mean_interval, ratio_interval, wilson_interval
from job.records import DetectorReport, Figures, Record
from job.records.evaluation import Reading, Score
from job.report.tables import AGREED, aligned, detector_agreement
from job.text.behaviour import REFUSAL_WORDS, BehaviourWords

Interval = tuple[float, float]


class Share(Record):
    """A count over both models' responses to the same prompts; the change's interval is as if independent."""

    name: str
    of: int
    base: int
    base_interval: Interval
    edited: int
    edited_interval: Interval
    change_interval: Interval


class Divergence(Record):
    """KL divergence from the base model on the good prompts in nats, with its 95 % interval.

    It is the mean over the prompts, and over the first `tokens` positions of the base model's responses.
    """

    tokens: int
    mean: float
    interval: Interval

    @classmethod
    def of(cls, tokens: int, values: Sequence[float]) -> Divergence:
        """Return the mean of all prompts' divergences with its interval."""
        return cls(tokens=tokens, mean=math.fsum(values) / len(values), interval=mean_interval(values))


class Surprise(Record):
    """Cross-entropy on plain text, nats per token, with its 95 % interval over the texts."""

    cross_entropy: float
    interval: Interval
    perplexity: float

    @classmethod
    def of(cls, losses: Sequence[float], tokens: Sequence[int]) -> Surprise:
        """Compute it from every text's cross-entropy and tokens."""
        mean = math.fsum(losses) / sum(tokens)
        return cls(cross_entropy=mean, interval=ratio_interval(losses, tokens), perplexity=math.exp(min(mean, 700.0)))


class TextComparison(Record):
    """Both models on the same plain text.

    Attributes:
        tokens: Number of predicted tokens, by the base model's tokenizer.
        change: Change in nats per token; None if the tokenizations differ.
        change_interval: Its 95 % interval over pairs of texts.
    """

    source: str
    texts: int
    tokens: int
    base: Surprise
    edited: Surprise
    change: float | None
    change_interval: Interval | None

    @classmethod
    def of(
        cls, source: str, base: tuple[Sequence[float], Sequence[int]], edited: tuple[Sequence[float], Sequence[int]]
    ) -> TextComparison:
        """Compare every text's cross-entropy and tokens."""
        alike = list(base[1]) == list(edited[1])
        changes = [after - before for before, after in zip(base[0], edited[0], strict=True)] if alike else []
        return cls(
            source=source,
            texts=len(base[1]),
            tokens=sum(base[1]),
            base=Surprise.of(*base),
            edited=Surprise.of(*edited),
            change=math.fsum(changes) / sum(base[1]) if alike else None,
            change_interval=ratio_interval(changes, base[1]) if alike else None,
        )


class Comparison(Record):
    """Comparison of two models.

    Attributes:
        trial: The trial of the edit, None for a separate model.
        divergences: KL divergences, by number of positions; empty if tokenizations differ.
        detectors: What detectors counted, None in results of former versions.
    """

    version: Literal[1] = 1
    model: str
    against: str
    trial: int | None
    base: Figures
    edited: Figures
    shares: tuple[Share, ...]
    divergences: tuple[Divergence, ...]
    text: TextComparison | None
    scores: tuple[Score, ...]
    reading: Reading | None = Field(None, exclude_if=lambda reading: reading is None)
    detectors: DetectorReport | None = None


def shares_of(base: Figures, edited: Figures) -> tuple[Share, ...]:
    """Return counts with intervals from two models' metrics on the same prompts."""
    counts = (
        ("refusals", base.bad_prompts, base.refusals, edited.refusals),
        ("false refusals", base.good_prompts, base.false_refusals, edited.false_refusals),
        ("broken responses, bad prompts", base.bad_prompts, base.degenerate, edited.degenerate),
        ("broken responses, good prompts", base.good_prompts, base.false_degenerate, edited.false_degenerate),
    )
    return tuple(
        Share(
            name=name,
            of=of,
            base=before,
            base_interval=wilson_interval(before, of),
            edited=after,
            edited_interval=wilson_interval(after, of),
            change_interval=difference_interval((before, of), (after, of)),
        )
        for name, of, before, after in counts
    )


def comparison_text(found: Comparison, words: BehaviourWords = REFUSAL_WORDS) -> str:
    """Format a comparison as a scorecard and a table of changes, with 95 % intervals."""
    return "\n\n".join([*_scorecard(found, words), _changes(found, words)])


def _scorecard(found: Comparison, words: BehaviourWords) -> Iterator[str]:
    """Yield the scorecard and how far detectors agree, at most 80 columns wide."""
    if not found.edited.outcomes:
        return
    tables = [rows(found.base, found.edited, words) for rows in (scorecard_rows, group_rows, thinking_rows)]
    yield from ("\n".join(map(str.rstrip, aligned(rows))) for rows in tables if rows)
    agreement = detector_agreement(found.detectors) if found.detectors is not None else []
    if len(agreement) > 1:
        yield "\n".join([f"{AGREED}:", *map(str.rstrip, aligned([list(map(str, row)) for row in agreement]))])


def _changes(found: Comparison, words: BehaviourWords) -> str:
    shares = (_share_row(share, words) for share in found.shares)
    rows: list[tuple[str, ...]] = [("", "base", "edited", "change"), *shares]
    for kl in found.divergences:
        name = "KL, first token" if kl.tokens == 1 else f"KL, {kl.tokens} tokens"
        rows.append((name, "", f"{kl.mean:.4g} {_range(kl.interval)}", ""))
    if found.text is not None:
        rows += _text_rows(found.text)
    for score in found.scores:
        rows.append(
            (
                f"{score.task} {score.metric}",
                _with_error(score.base, score.base_error),
                _with_error(score.edited, score.edited_error),
                score_change(score),
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines.append("[ ]: 95 % intervals" + ("; ±: standard errors" if found.scores else ""))
    if any(score.change_interval for score in found.scores):
        lines.append("intervals of benchmarks' changes are over the documents, each answered by both models")
    if found.reading is not None:
        lines.append(f"{found.reading.form}: {found.reading.note}")
    if found.text is not None:
        lines.append(f"plain text: {found.text.source}: {found.text.texts} texts, {found.text.tokens} tokens")
    return "\n".join(lines)


def score_change(score: Score) -> str:
    """Format a benchmark's change with its interval over the documents, else with its standard error."""
    if score.change_interval is None:
        return _with_error(score.change, score.change_error, "+.4g")
    counts = f", {score.better} better and {score.worse} worse of {score.items}"
    return f"{score.change:+.4g} {_range(score.change_interval, '+.4g')}{counts}"


def _share_row(share: Share, words: BehaviourWords) -> tuple[str, str, str, str]:
    change = 100 * (share.edited - share.base) / share.of
    return (
        {"refusals": words.counted, "false refusals": words.elsewhere}.get(share.name, share.name),
        f"{share.base}/{share.of} {_percent(share.base_interval)}",
        f"{share.edited}/{share.of} {_percent(share.edited_interval)}",
        f"{change:+.1f} points {_percent(share.change_interval, '+.1f')}",
    )


def _text_rows(text: TextComparison) -> list[tuple[str, ...]]:
    change = ""
    if text.change is not None and text.change_interval is not None:
        change = f"{text.change:+.4f} {_range(text.change_interval, '+.4f')}"
    both = (text.base, text.edited)
    entropies = [f"{one.cross_entropy:.4f} {_range(one.interval, '.4f')}" for one in both]
    return [
        ("cross-entropy, nats a token", *entropies, change),
        ("perplexity", *(f"{one.perplexity:.4g}" for one in both), ""),
    ]


def _percent(interval: Interval, form: str = ".1f") -> str:
    return _range((100 * interval[0], 100 * interval[1]), form) + " %"


def _range(interval: Interval, form: str = ".4g") -> str:
    return f"[{interval[0]:{form}}, {interval[1]:{form}}]"


def _with_error(value: float, error: float | None, form: str = ".4g") -> str:
    return f"{value:{form}}" + ("" if error is None else f" ± {error:.2g}")
