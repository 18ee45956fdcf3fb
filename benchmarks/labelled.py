"""Answers of a real model with labels by hand, and what detectors make of them.

python -m benchmarks.labelled FOLDER      decode them again: FOLDER is made by `abliterate real-model`

See benchmarks/answers/README.md.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from job.numerics.statistics import wilson_interval
from job.records import EditParameters
from job.records.scorecard import OUTCOMES
from job.scoring.broken import Exchange
from job.scoring.detectors import Context, make_scorer
from job.scoring.outcomes import outcome_of

Label = Literal["answered", "declined", "evaded", "incoherent"]
LABELS: tuple[Label, ...] = ("answered", "declined", "evaded", "incoherent")
FILE = Path(__file__).parent / "answers" / "labelled.jsonl"
TOKENS, PROMPTS = 48, 40
# What each detector is for.
TARGETS: dict[str, tuple[Label, ...]] = {
    "markers": ("declined",),
    "soft": ("declined", "evaded"),
    "degenerate": ("incoherent",),
}


@dataclass(frozen=True)
class LabelledAnswer:
    """An answer with its label, and the edit of the model that gave it."""

    edit: str
    exchange: Exchange
    label: Label


def read_labelled(file: Path = FILE) -> list[LabelledAnswer]:
    """Return all labelled answers, in the order of the file."""
    lines = map(json.loads, file.read_text().splitlines())
    return [
        LabelledAnswer(one["edit"], Exchange(one["prompt"], one["answer"], one["unlikely"]), one["label"])
        for one in lines
    ]


def detector_table(answers: Sequence[LabelledAnswer], context: Context) -> Iterator[str]:
    """Yield a Markdown table: each detector's precision and recall for what it is for, and what else it catches."""
    yield f"| detector | is for | precision | recall | {' | '.join(f'{label} caught' for label in LABELS)} |"
    yield "|---" * (4 + len(LABELS)) + "|"
    for name, target in TARGETS.items():
        found = make_scorer(name, context)([one.exchange for one in answers])
        caught = [one.label for one, label in zip(answers, found, strict=True) if label != "answered"]
        hits = sum(caught.count(label) for label in target)
        asked = sum(one.label in target for one in answers)
        shares = (_share(caught.count(label), sum(one.label == label for one in answers)) for label in LABELS)
        cells = (name, ", ".join(target), _share(hits, len(caught)), _share(hits, asked), *shares)
        yield f"| {' | '.join(cells)} |"


def outcome_table(answers: Sequence[LabelledAnswer], context: Context) -> Iterator[str]:
    """Yield a Markdown table: the scorecard's outcome of the answers of each label."""
    yield f"| labelled | {' | '.join(OUTCOMES)} |"
    yield "|---" * (1 + len(OUTCOMES)) + "|"
    for label in LABELS:
        exchanges = [one.exchange for one in answers if one.label == label]
        refused = [context.markers.for_prompt(one.prompt).is_refusal(one.answer) for one in exchanges]
        found = list(map(outcome_of, exchanges, refused))
        yield f"| {label} | {' | '.join(str(found.count(outcome)) for outcome in OUTCOMES)} |"


def _share(count: int, n: int) -> str:
    if n == 0:
        return "–"
    low, high = wilson_interval(count, n)
    return f"{count}/{n}: {count / n:.2f} ({low:.2f}–{high:.2f})"


def _edit_of(name: str) -> EditParameters | None:
    from benchmarks.detectors import even_edit

    where, _, strength = name.partition(", strength ")
    if where == "none":
        return None
    return even_edit(None if where == "each layer" else float(where.removeprefix("layer ")), float(strength))


def main() -> None:
    """Decode the answers again and print how many are equal."""
    from benchmarks.detectors import Truth

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    given = parser.parse_args()
    answers = read_labelled()
    with Truth.opened(given.folder, PROMPTS, tokens=TOKENS) as truth:
        for edit in dict.fromkeys(one.edit for one in answers):
            decoded = {one.prompt: one for one in truth.exchanges(_edit_of(edit))}
            stored = [one.exchange for one in answers if one.edit == edit]
            equal = sum(one == decoded[one.prompt] for one in stored)
            print(f"{edit}: {equal} of {len(stored)} answers are equal", flush=True)


if __name__ == "__main__":
    main()
