"""Events of a run, for people and programs.

`events.jsonl` gets one JSON object per line. People see lines, and what is under way on a live line of their terminal.
Elsewhere (docker logs) a job's lines begin with the time since its start. Secrets are redacted in both.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from job.errors import printable
from job.storage.atomic import cannot_read, cannot_write
from job.storage.progress import Steps, live_line, plain_lines
from job.system.clock import now
from job.text.durations import elapsed_text
from job.text.redaction import redact, redacted


class Events:
    """The event log of one run folder and its echo on the console."""

    def __init__(self, path: Path | None = None, stream: TextIO | None = None, *, verbose: bool = False) -> None:
        """Log to a file (None: not yet) and echo to a stream, by default stderr; `verbose` echoes minor events too."""
        self._path = path
        self._verbose = verbose
        self._timed = False
        self._stream = stream if stream is not None else sys.stderr
        self._echo: Callable[[str], None] = self._print
        self._listeners: list[Callable[[str, dict[str, Any]], None]] = []
        self._lock = threading.RLock()  # a signal's handler may emit within an emit
        # Differences of times are durations, whatever is done to the wall clock meanwhile.
        self._started = now()
        self._begun = time.time() - self._started

    def listen(self, listener: Callable[[str, dict[str, Any]], None]) -> None:
        """Add a listener, called with every recorded event and its fields."""
        self._listeners.append(listener)

    def log_to(self, path: Path | None) -> None:
        """Append to this file from now on, None for none; a torn last line is terminated first."""
        self._path = path
        self._timed |= path is not None and not self._stream.isatty()
        if path is None:
            return
        try:
            if path.exists() and path.stat().st_size:
                with path.open("rb+") as file:
                    file.seek(-1, os.SEEK_END)
                    if file.read(1) != b"\n":
                        file.write(b"\n")
        except OSError as error:
            raise cannot_write(path, error) from error

    def emit(self, event: str, message: str = "", *, minor: bool = False, **fields: Any) -> None:
        """Record an event: a message for people, fields for programs; from any thread. Raises MachineError.

        A `minor` one is recorded like any other, and shown to people who asked for all.
        """
        with self._lock:
            if self._path is not None:
                self._append(self._path, event, redacted({"message": message, **fields}))
            if message and (self._verbose or not minor):
                self._echo(printable(redact(message)))  # it may quote files of others
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
        begun = f"[{elapsed_text(now() - self._started)}] " if self._timed else ""
        try:
            print(f"{begun}{line}", file=self._stream, flush=True)
        except (OSError, ValueError):
            return  # no reader: no reason to lose the job

    @contextmanager
    def progress(
        self, label: str, total: int, done: int = 0, note: Callable[[], str] = str
    ) -> Iterator[Callable[[int], None]]:
        """Yield a function that advances by a number of steps, from `done` to at most `total`; 1 shows no steps.

        People see a live line with rate and ETA on a terminal, and otherwise a plain line every 30 s, also while no
        step ends. `label` says what is under way, and what the steps are; `note` returns what else to show.
        """
        work = Steps(label, total, done, note)
        if not self._stream.isatty():
            with plain_lines(self._print, work) as advance:
                yield advance
            return
        with live_line(self._stream, work) as (advance, echo):
            self._echo = echo
            try:
                yield advance
            finally:
                self._echo = self._print


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
