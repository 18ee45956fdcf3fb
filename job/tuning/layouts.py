"""Layouts that `--tune` tries, and those remembered for later jobs on the same model and device."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from job.records import Record
from job.storage.atomic import write_record

# In the workspace beside the cache of hashes, so that it moves with the workspace.
LAYOUTS = ".layouts.json"
# Slowdown by a doubling of rows beyond which more rows are not tried.
SLOWER = 1.25
# Layouts that differ by less, within noise, are equal: the one with the least memory wins.
ALIKE = 1.03
# Bisections between the two best powers of two.
STEPS = 2


class MeasuredLayout(Record):
    """A measured layout.

    Attributes:
        seconds: Time per trial; None: memory does not suffice.
        growth: Most additional memory in this job on each device, bytes.
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
    """Measure layouts: the rule's, increasing powers of two, then between the two best; return all.

    Doubling ends when memory ends or trials become slower. The rule's comes first, so the choice is never slower, even
    if time runs out. `forwards` identifies equal layouts; `rows` are the least, the start of the doubling, and the
    most.
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
    """Return the fastest layout and its better neighbour, or the one where memory ends."""
    order = sorted(found)
    best = min(order, key=lambda rows: _seconds(found[rows]))
    place = order.index(best)
    above, below = order[place + 1 : place + 2], order[max(place - 1, 0) : place]
    if not above or (below and math.inf > _seconds(found[above[0]]) > _seconds(found[below[0]])):
        return (*below, best, best)[0], best
    return best, above[0]


def best_of(found: Sequence[MeasuredLayout]) -> MeasuredLayout | None:
    """Return the fastest layout, with the fewest rows among equals; None if none fits."""
    fastest = min(map(_seconds, found), default=math.inf)
    good = [one for one in found if one.seconds is not None and one.seconds <= ALIKE * fastest]
    return min(good, key=lambda one: one.rows, default=None)


class Remembered(Record):
    """The layout chosen for a model, device and kind of prompts."""

    about: dict[str, Any]
    chosen: MeasuredLayout
    measured: list[MeasuredLayout]


class Layouts(Record):
    """The file of remembered layouts."""

    version: Literal[1] = 1
    layouts: tuple[Remembered, ...] = ()


def read_layouts(workspace: Path) -> Layouts | None:
    """Return a workspace's remembered layouts, None if its file is not ours or unreadable."""
    file = workspace / LAYOUTS
    if not file.exists():
        return Layouts()
    try:
        return Layouts.model_validate_json(file.read_bytes())
    except (OSError, ValidationError):
        return None


def remember(workspace: Path, layouts: Layouts, new: Remembered) -> None:
    """Remember a layout, replacing an earlier one for the same conditions. Raises MachineError."""
    others = [one for one in layouts.layouts if one.about != new.about]
    write_record(workspace / LAYOUTS, Layouts(layouts=(*others, new)))
