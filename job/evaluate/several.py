"""Several edits of one base model in one table, at most 80 columns wide."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

from job.evaluate.result import Comparison, Interval
from job.numerics.statistics import wilson_interval
from job.records import Record
from job.records.scorecard import OUTCOMES
from job.report.tables import aligned
from job.text.behaviour import REFUSAL_WORDS, BehaviourWords

# Edits beside the base model in a table of 80 columns, with cells of this width.
_BESIDE, _WIDTH = 3, 13
_KINDS: dict[Literal["bad", "good"], str] = {"bad": "behaviour", "good": "ordinary"}
_NONE = "–"
Row = tuple[str, ...]


class Comparisons(Record):
    """Several edits against one base model, which was measured once."""

    version: Literal[1] = 1
    against: str
    comparisons: tuple[Comparison, ...]


def comparisons_text(found: Comparisons, words: BehaviourWords = REFUSAL_WORDS) -> str:
    """Format all edits as tables of a few columns, with a legend."""
    edits = found.comparisons
    blocks = [_table(edits[start : start + _BESIDE], start, words) for start in range(0, len(edits), _BESIDE)]
    names = [f"base: {found.against}"]
    for index, one in enumerate(edits):
        names.append(f"{_name(index)}: {one.model}")
        if one.reading is not None:
            names.append(f"{_name(index)}: {one.reading.form}: {one.reading.note}")
    return "\n\n".join([*blocks, "\n".join([*names, *_notes(edits)])])


def _name(index: int) -> str:
    """Return an edit's short name: A to Z, then A1, B1 and so on."""
    letter, round_ = chr(ord("A") + index % 26), index // 26
    return f"{letter}{round_ or ''}"


def _table(edits: Sequence[Comparison], start: int, words: BehaviourWords) -> str:
    head = ("", "base", *(_name(start + index) for index in range(len(edits))))
    rows = [head, *_outcome_rows(edits, words), *_kl_rows(edits), *_other_rows(edits)]
    padded = [(row[0], *(cell.ljust(_WIDTH) for cell in row[1:])) for row in rows]
    return "\n".join(line.rstrip() for line in aligned(padded))


def _outcome_rows(edits: Sequence[Comparison], words: BehaviourWords) -> Iterator[Row]:
    models = [edits[0].base, *(one.edited for one in edits)]
    for kind, name in _KINDS.items():
        whole = [figures.outcomes_of_all(kind) for figures in models]
        for outcome in (*OUTCOMES, "empty"):
            cells = [_NONE if one is None else _share(getattr(one, outcome), one.responses) for one in whole]
            yield (f"{name}, % {_short(outcome, words)}", *cells)


def _short(outcome: str, words: BehaviourWords) -> str:
    """Return an outcome in words that fit a narrow column."""
    return outcome if words.refuses else {"refused": "with it", "answered": "without it"}.get(outcome, outcome)


def _share(count: int, n: int) -> str:
    low, high = wilson_interval(count, n)
    return f"{100 * count / n:.0f} ({100 * low:.0f}–{100 * high:.0f})"


def _kl_rows(edits: Sequence[Comparison]) -> Iterator[Row]:
    figures = [one.edited for one in edits]
    first = [(one.kl, one.kl_interval, one.kl_spread) for one in figures]
    more = [(one.mean, one.interval, one.spread) if (one := each.kl_more) else (None, None, None) for each in figures]
    tokens = next((one.kl_more.tokens for one in figures if one.kl_more), 1)
    for positions, values in ((figures[0].kl_tokens, first), (tokens, more)):
        if all(mean is None for mean, _, _ in values):
            continue
        name = "KL, first token" if positions == 1 else f"KL, {positions} tokens"
        yield (name, "0", *(_NONE if mean is None else f"{mean:.3g}" for mean, _, _ in values))
        yield ("  interval", "", *(_interval(interval) for _, interval, _ in values))
        for part, label in (("median", "median"), ("ninetieth", "90 %"), ("largest", "largest")):
            cells = (_NONE if spread is None else f"{getattr(spread, part):.3g}" for _, _, spread in values)
            yield (f"  {label}", "", *cells)


def _interval(interval: Interval | None) -> str:
    return _NONE if interval is None else f"{interval[0]:.2g}–{interval[1]:.2g}"


def _other_rows(edits: Sequence[Comparison]) -> Iterator[Row]:
    texts = [one.text for one in edits]
    if (known := next(filter(None, texts), None)) is not None:
        cells = (_NONE if text is None else f"{text.edited.cross_entropy:.4g}" for text in texts)
        yield ("cross-entropy, nats", f"{known.base.cross_entropy:.4g}", *cells)
    for score in edits[0].scores:
        name = (score.task, score.metric)
        others = [{(other.task, other.metric): other.edited for other in one.scores} for one in edits]
        yield (" ".join(name), f"{score.base:.4g}", *(f"{o[name]:.4g}" if name in o else _NONE for o in others))


def _notes(edits: Sequence[Comparison]) -> Iterator[str]:
    base = edits[0].base
    yield f"prompts: {base.bad_prompts} with the behaviour, {base.good_prompts} ordinary ones; ( ): 95 % intervals"
    yield "every response counts once; empty ones are also among the broken"
    if (text := edits[0].text) is not None:
        yield f"cross-entropy on {text.source}"
