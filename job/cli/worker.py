"""A worker: evaluates what it is given by a job's coordinator, on this machine or from another one."""

from __future__ import annotations

import ctypes
import json
import os
import secrets
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from job.data.prompts import PromptSets
from job.errors import JobError, MachineError, UsageError
from job.lifecycle.locate import Whereabouts
from job.lifecycle.running import OpenJob
from job.mirror.records import LINEAGE
from job.mirror.vetting import as_given, require_same_contents, with_trust
from job.records import EditParameters
from job.storage.atomic import read_record, write_record
from job.storage.events import Events
from job.storage.job_file import JobFile
from job.storage.jobs import job_settings
from job.storage.run_folder import RunFolder
from job.text.redaction import guarded_output
from job.workers.board import Board, BoardTask, signs_of_life, waits
from job.workers.crew import Crew, WarmWorkerPool, is_orphan, result_of

if TYPE_CHECKING:
    from job.stages.session import ModelSession

_LOOK_SECONDS = 2.0
_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Work for the run that has started this process, until it ends it.

    The task is a line of standard input. All that takes seconds to load is loaded before it comes, with the code of a
    model whose folder may be the only argument.
    """
    with guarded_output():
        _work_for_run()


def _work_for_run() -> None:
    # Not even `kill -9` of the run may leave a GPU occupied.
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    import torch

    import job.stages.session  # noqa: F401
    from job.proof.truth_test import inspect_model

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the run is at work meanwhile
    for model in sys.argv[1:]:
        try:
            inspect_model(Path(model))
        except JobError:
            continue  # preflight tells what is wrong with it
    torch.set_num_threads(threads)
    line = sys.stdin.readline()
    if not line:
        return  # there will be no task
    task = json.loads(line)
    events = Events()
    try:
        with Board(task["board"], Path(task["folder"]).name) as board:
            _work(RunFolder(Path(task["folder"])), board, task["name"], events, lambda: is_orphan(task["parent"]))
    except JobError as error:
        events.say(f"{task['name']}: {error.line}")
        sys.exit(error.exit_code)


def help_job(where: Whereabouts, workers: int | None, wait_minutes: float, events: Events) -> None:
    """Evaluate for a job's coordinator until its search is done.

    Args:
        where: The job; the workspace is one that all share, or where its checkpoint is fetched to.
        workers: Processes on this machine; None: one for every GPU.
        wait_minutes: How long there may be no sign of life of a coordinator.
        events: Where progress goes.

    Raises:
        UsageError: There is no such job, or it has no database.
        MachineError: There was no sign of life for too long, or the database cannot be reached.
    """
    deadline = _Deadline(wait_minutes)
    folder = _found(where, deadline, events)
    given = where.given
    database = job_settings(folder, whole=True, **as_given(given)).database
    if database is None and where.checkpoint is not None:
        raise UsageError(
            "where the database is, is not taken from a checkpoint",
            remedy="give the job's with --set database=postgresql+psycopg://USER@HOST/NAME",
        )
    if database is None:
        raise UsageError(
            f"job {folder.path.name} has no database in which others find tasks",
            remedy="run it with --set database=postgresql+psycopg://USER@HOST/NAME",
        )
    with_trust(folder.read_job(), job_settings(folder, whole=True, **as_given(given)), given)
    name = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(2)}"
    with Board(database, folder.path.name) as board:
        while (standing := board.standing()) is None or standing[0] != "searching":
            if standing is not None and standing[0] == "done":
                events.say("the search is done; nothing to do")
                return
            deadline.wait(f"job {folder.path.name} is not searching")
        if where.checkpoint is not None:
            # With the directions, which are there once it searches.
            folder = _fetched(where, deadline)
            _put_down(folder, given)
        with _others(folder, board, database, workers, name, events) as processes:
            _work(folder, board, name, events, _silence(board, deadline), processes)
    events.say("the search is done")


@contextmanager
def _others(
    folder: RunFolder, board: Board, database: str, workers: int | None, name: str, events: Events
) -> Iterator[int]:
    """Have this machine's other workers within the block; yield how many it has, this one included."""
    from job.stages.model import cuda_devices

    devices = cuda_devices()
    processes = workers or max(1, len(devices))
    with WarmWorkerPool(0) as hands:
        crew = Crew(board, events, hands, prefix=name)
        try:
            for number in range(1, processes):
                crew.start(folder, database, devices[number % len(devices)] if devices else None)
            yield processes
        finally:
            crew.dismiss()


def _put_down(folder: RunFolder, given: Mapping[str, Any]) -> None:
    """Write what this side gives into a job.json that came from a checkpoint, for all workers of this machine."""
    record, settings = folder.read_job(), job_settings(folder, whole=True, **as_given(given))
    with_trust(record, settings, given)
    require_same_contents(record, settings, prompts=False)
    write_record(folder.job_file, record.model_copy(update={"settings": settings.model_dump(mode="json")}))


class _Deadline:
    """How long there may be no sign of life."""

    def __init__(self, minutes: float) -> None:
        self._minutes = minutes
        self.renew()

    def renew(self) -> None:
        self._since = time.monotonic()

    def check(self, what: str) -> None:
        """Return if there is time left.

        Raises:
            MachineError: There is none.
        """
        if time.monotonic() - self._since > 60 * self._minutes:
            raise MachineError(f"{what}: no sign of life for {self._minutes:g} minutes", remedy="start the job again")

    def wait(self, what: str) -> None:
        self.check(what)
        time.sleep(_LOOK_SECONDS)


def _found(where: Whereabouts, deadline: _Deadline, events: Events) -> RunFolder:
    """Return the run folder of a job that may still have to begin."""
    said = False
    while True:
        try:
            return where.folder() if where.checkpoint is None else _fetched(where, deadline, whole=False)
        except UsageError as error:
            if not said:
                events.say(f"waiting: {error.line}")
                said = True
            deadline.wait(str(error))


def _fetched(where: Whereabouts, deadline: _Deadline, *, whole: bool = True) -> RunFolder:
    """Return a copy of a run folder from its checkpoint, once that has the directions if they are wanted."""
    while True:
        with where.mirror() as mirror:
            job = where.mirrored(mirror).job_id
            if (where.workspace / job / LINEAGE).exists():
                raise MachineError(
                    f"{where.workspace / job} is the run folder of the run itself",
                    remedy="leave --checkpoint out, or give another --workspace",
                )
            found = mirror.fetch(job, where.workspace, whole=whole).folder
        if not whole or list((found.path / "directions").glob("*.safetensors")):
            return found
        deadline.wait(f"{where.checkpoint} has no directions yet")


def _silence(board: Board, deadline: _Deadline) -> Callable[[], bool]:
    """Return what tells whether the search is over; it raises where the coordinator is silent for too long."""
    seen: list[tuple[str, int] | None] = [None]

    def over() -> bool:
        standing = board.standing()
        if standing != seen[0]:
            seen[0] = standing
            deadline.renew()
        deadline.check("the coordinator is silent")
        return standing is not None and standing[0] == "done"

    return over


def _work(
    folder: RunFolder,
    board: Board,
    name: str,
    events: Events,
    is_over: Callable[[], bool],
    processes: int | None = None,
) -> None:
    """Evaluate tasks until it is over, as one of so many processes of this machine; None: of the job's own."""
    from job.stages.model import share_of_cores, worker_count
    from job.stages.session import opened_session

    job = OpenJob(folder, JobFile(folder), job_settings(folder), events)
    with (
        opened_session(job, read_record(folder.prompts_file, PromptSets)) as session,
        share_of_cores(session.model, processes or worker_count(job.settings, session.model)),
        signs_of_life(lambda: board.beat(name)),
    ):
        events.say(f"{name} is ready")
        looked, pauses = time.monotonic(), waits()
        while True:
            task = board.claim(name)
            if task is not None:
                board.finish(name, task, _result(session, task))
                pauses = waits()
                continue
            if time.monotonic() - looked > _LOOK_SECONDS:
                looked = time.monotonic()
                if is_over():
                    return
            time.sleep(next(pauses))


def _result(session: ModelSession, task: BoardTask) -> dict[str, object]:
    from job.model.device_faults import is_out_of_memory
    from job.model.memory import release_memory

    edits = [EditParameters.model_validate(edit) for edit in task.payload["edits"]]
    try:
        return result_of(session.scorer.scores(edits, task.payload["rows"], task.payload["whole"]))
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        release_memory()
        return {"out_of_memory": str(error)}
