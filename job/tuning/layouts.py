"""Row layouts that `--tune` tries, and those that it remembers for the next job on the same model and device."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from job.records import Record
from job.storage.atomic import write_record

# In the workspace, beside the memo of hashes: it stays where the workspace goes, and nothing is kept elsewhere.
LAYOUTS = ".layouts.json"
# Where doubling the rows makes trials so much slower, more rows are not tried.
SLOWER = 1.25
# Of layouts that differ by less, which is within the noise, the one that takes the least memory is best.
ALIKE = 1.03
# Bisections between the two best powers of two.
STEPS = 2


class MeasuredLayout(Record):
    """A layout as it was measured.

    Attributes:
        rows: Rows of a forward.
        seconds: What a trial took; None: memory does not suffice.
        growth: Memory that it may take at most in this job beside what was in use before, on each device, bytes.
    """

    rows: int
    seconds: float | None
    growth: tuple[int, ...] = ()


def climb(
    measure: Callable[[int], MeasuredLayout],
    forwards: Callable[[int], Any],
    *,
    rule: int,
    rows: Sequence[int],
    may_go_on: Callable[[], bool],
) -> list[MeasuredLayout]:
    """Measure layouts: the rule's, powers of two upwards, then what lies between the two best; return them all.

    Doubling ends where memory ends or trials get slower. The rule's comes first, so that whatever else there is no
    time for, what is chosen is no slower.

    Args:
        measure: Measures a layout.
        forwards: Tells layouts apart: those of equal forwards need not both be measured.
        rule: The rule's rows.
        rows: Rows at least, where doubling begins, and at most.
        may_go_on: Asked before every measurement but the first.
    """
    found: dict[int, MeasuredLayout] = {rule: measure(rule)}
    least, begin, most = rows

    def seconds(rows: int) -> float:
        if rows not in found:
            found[rows] = measure(rows)
        return _seconds(found[rows])

    rows_now = begin
    while rows_now > least and may_go_on() and seconds(rows_now) == math.inf:
        rows_now = max(rows_now // 2, least)
    while rows_now <= most and may_go_on():
        smaller = [_seconds(one) for one in found.values() if one.rows < rows_now]
        if seconds(rows_now) > SLOWER * min(smaller, default=math.inf) or seconds(rows_now) == math.inf:
            break
        rows_now *= 2
    low, high = _two_best(found)
    for _ in range(STEPS):
        middle = (low + high) // 2 // least * least
        if not low < middle < high or forwards(middle) in (forwards(low), forwards(high)) or not may_go_on():
            break
        seconds(middle)
        low, high = sorted((middle, min((low, high), key=seconds)))
    return sorted(found.values(), key=lambda one: one.rows)


def _seconds(measured: MeasuredLayout) -> float:
    return math.inf if measured.seconds is None else measured.seconds


def _two_best(found: Mapping[int, MeasuredLayout]) -> tuple[int, int]:
    """Return the fastest layout and the better of its neighbours, or where memory ends if that is one of them."""
    order = sorted(found)
    best = min(order, key=lambda rows: _seconds(found[rows]))
    place = order.index(best)
    above, below = order[place + 1 : place + 2], order[max(place - 1, 0) : place]
    if not above or (below and math.inf > _seconds(found[above[0]]) > _seconds(found[below[0]])):
        return (*below, best, best)[0], best
    return best, above[0]


def best_of(found: Sequence[MeasuredLayout]) -> MeasuredLayout | None:
    """Return the fastest layout, the one of fewest rows among those that are as good; None where none fits."""
    fastest = min(map(_seconds, found), default=math.inf)
    good = [one for one in found if one.seconds is not None and one.seconds <= ALIKE * fastest]
    return min(good, key=lambda one: one.rows, default=None)


class Remembered(Record):
    """The layout that was chosen for a model, device and kind of prompts.

    Attributes:
        about: What it was measured for.
        chosen: The layout.
        measured: All that were measured.
    """

    about: dict[str, Any]
    chosen: MeasuredLayout
    measured: list[MeasuredLayout]


class Layouts(Record):
    """The file of remembered layouts."""

    version: Literal[1] = 1
    layouts: tuple[Remembered, ...] = ()


def read_layouts(workspace: Path) -> Layouts | None:
    """Return what a workspace remembers, None where its file is not one of ours or cannot be read."""
    file = workspace / LAYOUTS
    if not file.exists():
        return Layouts()
    try:
        return Layouts.model_validate_json(file.read_bytes())
    except (OSError, ValidationError):
        return None


def remember(workspace: Path, layouts: Layouts, new: Remembered) -> None:
    """Write a layout down, in place of what was remembered for the same before.

    Raises:
        MachineError: The file cannot be written.
    """
    others = [one for one in layouts.layouts if one.about != new.about]
    write_record(workspace / LAYOUTS, Layouts(layouts=(*others, new)))
