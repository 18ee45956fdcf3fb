"""Everybody who evaluates a plan: the run itself, its workers on other GPUs, and those that help from other machines.

The run is the coordinator. It alone asks and tells; it posts every plan in parts, works along, and puts the parts
together. A worker that dies or falls silent loses its part to another. What a part contains is written in the
plan, so the trials do not depend on who evaluates them, nor on how many there are (docs/decisions/0015-workers.md).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from job.records import EditParameters, Plan, TrialScores
from job.storage.events import Events
from job.storage.run_folder import RunFolder
from job.system.tempdirs import scratch
from job.workers.board import Board, signs_of_life, waits

# Scores some edits in one batch, with so many rows a forward, and whether on answers of full length.
Here = Callable[[Sequence[EditParameters], int, bool], Sequence[TrialScores]]
# A plan and its parts.
Round = tuple[Plan, Sequence[Sequence[EditParameters]]]
# Scores all parts of the first round, and may begin with the others.
Shared = Callable[[Sequence[Round], Here], list[TrialScores]]

SILENT_SECONDS = 20.0
_ME = "coordinator"


def in_turn(rounds: Sequence[Round], here: Here) -> list[TrialScores]:
    """Score all parts of the first round in this process."""
    plan, parts = rounds[0]
    return [scores for part in parts for scores in here(part, plan.rows, plan.whole)]


class WorkerOutOfMemory(MemoryError):  # noqa: N818 - a MemoryError, and handled as one
    """A worker's memory does not suffice for the plan's rows."""


class WarmWorkerPool:
    """Processes of this machine that may become workers: they load what takes seconds, then wait to be given a job."""

    def __init__(self, count: int, model: Path | None = None) -> None:
        """Start so many; more are started as they are needed.

        Args:
            count: How many.
            model: The model's folder, if it is there already: of its family's code they need more than of others'.
        """
        self._model = model
        self._waiting = [self._start() for _ in range(count)]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        end(self._waiting)

    def give(self, task: dict[str, Any], device: str | None) -> subprocess.Popen[bytes]:
        """Return a process that works on a task from now on, on a device that CUDA knows by this name."""
        # What has loaded its libraries may have settled which devices it sees.
        process = self._waiting.pop(0) if self._waiting and device is None else self._start(device)
        assert process.stdin is not None
        try:
            process.stdin.write(json.dumps(task).encode() + b"\n")
            process.stdin.close()
        except BrokenPipeError:
            pass  # it has died, which will be noticed as with any worker
        return process

    def _start(self, device: str | None = None) -> subprocess.Popen[bytes]:
        env = os.environ if device is None else {**os.environ, "CUDA_VISIBLE_DEVICES": device}
        # A session of its own: Ctrl-C is for the run, which then ends its workers.
        return subprocess.Popen(
            [
                sys.executable,
                "-c",
                "from job.cli.worker import main; main()",
                *([str(self._model)] if self._model else []),
            ],
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )


def end(processes: Collection[subprocess.Popen[bytes]]) -> None:
    """End processes at once."""
    for process in processes:
        process.kill()
    for process in processes:
        process.wait()
        if process.stdin is not None:
            process.stdin.close()


@contextmanager
def crew(
    folder: RunFolder, workers: int, devices: Sequence[str], database: str | None, events: Events, hands: WarmWorkerPool
) -> Iterator[Shared]:
    """Yield what scores plans: this process alone, or with others.

    Args:
        folder: The run folder, held by this run, with all that a search needs.
        workers: Processes on this machine, this one included.
        devices: What CUDA calls its devices, the first of which is this process'; empty without CUDA.
        database: Where workers of other machines find their tasks; None: there are none.
        events: Where progress goes.
        hands: Processes that may become workers.

    Raises:
        HeldError: Another run is the job's coordinator.
        MachineError: The database cannot be reached.
    """
    if workers == 1 and database is None:
        yield in_turn
        return
    with scratch("tasks") as place:
        url = database or f"sqlite:///{place}/tasks.db"
        with Board(url, folder.path.name) as board:
            board.lead()
            board.post({})  # what a former coordinator has claimed would wait for it
            made = Crew(board, events, hands)
            try:
                for number in range(1, workers):
                    made.start(folder, url, devices[number % len(devices)] if devices else None)
                board.say("searching")
                with signs_of_life(lambda: board.say("searching")):
                    yield made.scores
                board.say("done")
            finally:
                made.dismiss()


class Crew:
    """The coordinator's side of a board."""

    def __init__(
        self,
        board: Board,
        events: Events,
        hands: WarmWorkerPool,
        silent_s: float = SILENT_SECONDS,
        prefix: str = "worker",
    ) -> None:
        """Coordinate through a board.

        Args:
            board: The board.
            events: Where the fate of workers is told.
            hands: Processes that may become workers.
            prefix: What the names of workers begin with.
            silent_s: How long a worker may give no sign of life.
        """
        self._board = board
        self._events = events
        self._hands = hands
        self._silent = silent_s
        self._prefix = prefix
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._seen: dict[str, tuple[int, float]] = {}

    def start(self, folder: RunFolder, url: str, device: str | None) -> None:
        """Start a worker on this machine, on a device that CUDA knows by this name."""
        name = f"{self._prefix}-{len(self._processes) + 1}"
        task = {"name": name, "folder": str(folder.path), "board": url, "parent": os.getpid()}
        self._processes[name] = self._hands.give(task, device)
        self._events.emit("worker_started", f"{name} starts{f' on device {device}' if device else ''}", worker=name)

    def dismiss(self) -> None:
        """End the workers of this machine."""
        end(self._processes.values())

    def scores(self, rounds: Sequence[Round], here: Here) -> list[TrialScores]:
        """Score all parts of the first round, some of them in this process; those after it are done by who is free.

        Raises:
            WorkerOutOfMemory: A worker's memory does not suffice.
            MachineError: The database cannot be reached.
        """
        board = self._board
        known = {plan.first: (plan, parts) for plan, parts in rounds}
        board.post(
            {
                first: [
                    {"edits": [edit.model_dump() for edit in part], "rows": plan.rows, "whole": plan.whole}
                    for part in parts
                ]
                for first, (plan, parts) in known.items()
            }
        )
        first, parts = rounds[0][0].first, rounds[0][1]
        self._seen.clear()
        pauses = waits()
        while len(results := board.results(first)) < len(parts):
            self._free_what_is_lost()
            task = board.claim(_ME)
            if task is None:
                time.sleep(next(pauses))
            else:
                plan, own = known[task.round]
                board.finish(_ME, task, result_of(here(own[task.number], plan.rows, plan.whole)))
        return [scores for number in range(len(parts)) for scores in _scores(results[number])]

    def _free_what_is_lost(self) -> None:
        """Free the tasks of workers that have died, or given no sign of life for too long."""
        claims = self._board.claims()
        for name in [name for name, process in self._processes.items() if process.poll() is not None]:
            code = self._processes.pop(name).returncode
            self._lost(name, f"has died (exit code {code})", held=name in claims)
            claims.pop(name, None)
        now = time.monotonic()
        for name, beat in claims.items():
            seen, since = self._seen.get(name, (None, now))
            if name == _ME or beat != seen:
                self._seen[name] = (beat, now)
            elif now - since > self._silent:
                self._lost(name, "is silent", held=True)

    def _lost(self, name: str, why: str, *, held: bool) -> None:
        self._board.release(name)
        goes = ": its trials go to another" if held else ""
        self._events.emit("worker_lost", f"warning: {name} {why}{goes}", worker=name)


def result_of(scores: Sequence[TrialScores]) -> dict[str, Any]:
    """Return scores as the result of a task."""
    return {"scores": [one.model_dump() for one in scores]}


def _scores(result: dict[str, Any]) -> list[TrialScores]:
    if "out_of_memory" in result:
        raise WorkerOutOfMemory(result["out_of_memory"])
    return [TrialScores.model_validate(one) for one in result["scores"]]


def parts_of(plan: Plan, edits: Sequence[EditParameters]) -> list[Sequence[EditParameters]]:
    """Return a plan's edits in the parts that are evaluated together."""
    size = plan.together or len(edits)
    return [edits[start : start + size] for start in range(0, len(edits), size)]


def is_orphan(parent: int) -> bool:
    """Return whether the run that has started this worker is gone."""
    return os.getppid() != parent or not Path(f"/proc/{parent}").exists()
