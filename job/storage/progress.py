"""Progress of what is under way: one live line on a terminal, and a plain line every 30 s elsewhere (docker logs)."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TextIO

from job.system.periodic import every
from job.text.durations import duration_text, rate_text

_SECONDS = 30.0
_BAR, _GAPS, _SHORTEST = 12, 2, 12
Print = Callable[[str], None]
Advance = Callable[[int], None]


@dataclass(frozen=True)
class Steps:
    """Steps under way.

    Attributes:
        label: What the steps are.
        total: All steps, or an upper bound; 1 shows none.
        done: Steps done before.
        note: Returns what else to show.
    """

    label: str
    total: int
    done: int = 0
    note: Callable[[], str] = str


@contextmanager
def live_line(stream: TextIO, work: Steps) -> Iterator[tuple[Advance, Print]]:
    """Show a line on a terminal until the block ends; yield what advances it and what prints above it."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn
    from rich.table import Column

    one_line = Column(no_wrap=True, overflow="ellipsis")
    columns = (
        TextColumn("{task.description}", markup=False, table_column=one_line),
        BarColumn(_BAR),
        TextColumn("{task.fields[told]}", markup=False, table_column=one_line),
    )
    # It vanishes at its end: totals may be upper bounds, and events say what came of it.
    with Progress(*columns, console=Console(file=stream), transient=True) as bars:
        total = work.total if work.total > 1 else None
        task = bars.add_task(work.label, total=total, completed=work.done, told="")
        clock = _Clock(work)

        def tell() -> None:
            told = clock.told()
            label = shortened(work.label, bars.console.width - _BAR - _GAPS - len(told))
            bars.update(task, description=label, completed=clock.done, told=told)

        def advance(steps: int) -> None:
            clock.done += steps
            tell()

        tell()
        with every(1.0, tell, "progress"):
            # Lines printed while the bar is live have to go through its console.
            yield advance, partial(bars.console.print, markup=False, highlight=False)


def shortened(label: str, width: int) -> str:
    """Return a label cut to `width` columns, and no shorter than is readable: figures matter more."""
    width = max(width, _SHORTEST)
    return label if len(label) <= width else f"{label[: width - 1].rstrip()}…"


@contextmanager
def plain_lines(say: Print, work: Steps) -> Iterator[Advance]:
    """Print a line every 30 s until the block ends, also while no step ends; yield what advances it."""
    clock = _Clock(work)
    last = time.monotonic()

    def tell() -> None:
        nonlocal last
        if time.monotonic() - last >= _SECONDS:
            last = time.monotonic()
            say(f"{work.label}: {clock.told()}")

    def advance(steps: int) -> None:
        clock.done += steps
        if clock.done < work.total:
            tell()

    with every(_SECONDS / 10, tell, "progress"):
        yield advance


class _Clock:
    """Steps done, and the time since the start."""

    def __init__(self, work: Steps) -> None:
        self.done = work.done
        self._work = work
        self._started = time.monotonic()

    def told(self) -> str:
        """Return steps, rate, ETA and note."""
        work, taken = self._work, time.monotonic() - self._started
        steps = self.done - work.done
        parts = [f"{self.done}/{work.total}"] if work.total > 1 else []
        if steps > 0:
            parts += [rate_text(steps, taken), f"ETA {duration_text(taken / steps * max(work.total - self.done, 0))}"]
        else:
            parts.append(f"{duration_text(taken)} so far")
        note = work.note()
        return ", ".join(parts) + (f"; {note}" if note else "")
