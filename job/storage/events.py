"""Events of a run, for people and programs.

`events.jsonl` gets one JSON object per line. People see progress bars with an ETA on a terminal, and plain lines
otherwise (docker logs). Secrets are redacted in both.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from job.storage.atomic import cannot_read, cannot_write
from job.system.clock import now
from job.system.periodic import every
from job.text.redaction import redact, redacted

_PLAIN_PROGRESS_SECONDS = 10.0
# Without a terminal, something under way is mentioned at least so often.
_SILENCE_SECONDS = 30.0


class Events:
    """The event log of one run folder and its echo on the console."""

    def __init__(self, path: Path | None = None, stream: TextIO | None = None) -> None:
        """Log to a file (None: not yet) and echo to a stream, by default stderr."""
        self._path = path
        self._stream = stream if stream is not None else sys.stderr
        self._echo = self._print
        self._listeners: list[Callable[[str, dict[str, Any]], None]] = []
        self._lock = threading.RLock()  # a signal's handler may emit within an emit
        # Differences of times are durations, whatever is done to the wall clock meanwhile.
        self._begun = time.time() - now()

    def listen(self, listener: Callable[[str, dict[str, Any]], None]) -> None:
        """Add a listener, called with every recorded event and its fields."""
        self._listeners.append(listener)

    def log_to(self, path: Path | None) -> None:
        """Append to this file from now on, None for none; a torn last line is terminated first."""
        self._path = path
        try:
            if path is not None and path.exists() and path.stat().st_size:
                with path.open("rb+") as file:
                    file.seek(-1, os.SEEK_END)
                    if file.read(1) != b"\n":
                        file.write(b"\n")
        except OSError as error:
            raise cannot_write(path, error) from error

    def emit(self, event: str, message: str = "", **fields: Any) -> None:
        """Record an event: a message for people, fields for programs; from any thread. Raises MachineError."""
        with self._lock:
            if self._path is not None:
                self._append(self._path, event, redacted({"message": message, **fields}))
            if message:
                self._echo(redact(message))
            for listener in self._listeners:
                listener(event, fields)

    def _append(self, path: Path, event: str, said: dict[str, Any]) -> None:
        line = json.dumps({"time": round(self._begun + now(), 3), "event": event, **said}, ensure_ascii=False)
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
        except OSError as error:
            raise cannot_write(path, error) from error

    def say(self, message: str) -> None:
        """Record a message."""
        self.emit("message", message)

    def _print(self, line: str) -> None:
        try:
            print(line, file=self._stream, flush=True)
        except (OSError, ValueError):
            return  # no reader: no reason to lose the job

    @contextmanager
    def progress(self, label: str, total: int, done: int = 0) -> Iterator[Callable[[int], None]]:
        """Yield a function that advances by a number of steps, from `done` to at most `total`; 1 shows no steps.

        People see a bar with ETA on a terminal, and otherwise a plain line every 10 to 30 s, also while no step ends.
        `label` says what is under way, and what the steps are.
        """
        shown = self._bar if self._stream.isatty() else self._plain
        with shown(label, total, done) as advance:
            yield advance

    @contextmanager
    def _bar(self, label: str, total: int, done: int) -> Iterator[Callable[[int], None]]:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
        )
        # It vanishes at its end: totals may be upper bounds, and events say what came of it.
        with Progress(*columns, console=Console(file=self._stream), transient=True) as bars:
            task = bars.add_task(label, total=total if total > 1 else None, completed=done)
            # Lines printed while the bar is live have to go through its console.
            self._echo = partial(bars.console.print, markup=False, highlight=False)
            try:
                yield lambda steps: bars.advance(task, steps)
            finally:
                self._echo = self._print

    @contextmanager
    def _plain(self, label: str, total: int, done: int) -> Iterator[Callable[[int], None]]:
        started = last = time.monotonic()
        first = done

        def tell() -> None:
            nonlocal last
            last = time.monotonic()
            taken = last - started
            steps = f"{done}/{total}, " if total > 1 else ""
            left = f"ETA {taken / (done - first) * (total - done):.0f} s" if done > first else f"{taken:.0f} s so far"
            self._print(f"{label}: {steps}{left}")

        def advance(steps: int) -> None:
            nonlocal done
            done += steps
            if time.monotonic() - last >= _PLAIN_PROGRESS_SECONDS and done < total:
                tell()

        def break_silence() -> None:
            if time.monotonic() - last >= _SILENCE_SECONDS:
                tell()

        with every(_SILENCE_SECONDS / 10, break_silence, "progress"):
            yield advance


def read_events(path: Path) -> list[dict[str, Any]]:
    """Return a run's events, skipping torn lines. Raises DamagedError if the file cannot be read at all."""
    try:
        text = path.read_text("utf-8", errors="replace") if path.exists() else ""
    except OSError as error:
        raise cannot_read(path, error) from error
    events = []
    for line in text.split("\n"):  # at line feeds alone: other ends of lines may stand within a message
        try:
            event = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(event, dict):
            events.append(event)
    return events
