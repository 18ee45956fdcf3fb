"""Numbered tasks on a table that processes share, on this machine or on several.

The coordinator posts a plan's tasks and takes back those of workers that fall silent; whoever is free claims the
next one and writes down what came of it. Workers give signs of life by counting up, so no clocks are compared. The
table is a file of SQLite for processes of one machine, and lies in PostgreSQL for several
(docs/decisions/0015-workers.md).
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError, ProgrammingError, SQLAlchemyError

from job.errors import HeldError, JobError, MachineError
from job.system.failpoints import reached

_TABLES = sa.MetaData()
_JOBS = sa.Table(
    "abliterate_jobs",
    _TABLES,
    sa.Column("job", sa.String(64), primary_key=True),
    sa.Column("state", sa.String(16), nullable=False),
    sa.Column("beat", sa.BigInteger, nullable=False),
)
_TASKS = sa.Table(
    "abliterate_tasks",
    _TABLES,
    sa.Column("job", sa.String(64), primary_key=True),
    sa.Column("round", sa.Integer, primary_key=True),
    sa.Column("number", sa.Integer, primary_key=True),
    sa.Column("payload", sa.Text, nullable=False),
    sa.Column("worker", sa.String(128)),
    sa.Column("beat", sa.BigInteger, nullable=False, default=0),
    sa.Column("result", sa.Text),
)


# How long to wait before one looks at a board again: at first and at most. Most of what is waited for comes soon.
_SHORTEST_WAIT, _LONGEST_WAIT = 0.002, 0.05
# How often those who are at it say so.
_BEAT_SECONDS = 2.0


def waits() -> Iterator[float]:
    """Yield how long to wait again and again for something on a board, seconds."""
    wait = _SHORTEST_WAIT
    while True:
        yield wait
        wait = min(1.5 * wait, _LONGEST_WAIT)


@contextmanager
def signs_of_life(give: Callable[[], None]) -> Iterator[None]:
    """Have signs of life given from a thread within the block."""
    ended = threading.Event()

    def live() -> None:
        while not ended.wait(_BEAT_SECONDS):
            try:
                give()
            except JobError:
                continue  # the main thread will meet it

    thread = threading.Thread(target=live, name="signs of life", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


@dataclass(frozen=True)
class BoardTask:
    """A task that a worker has claimed.

    Attributes:
        round: Which plan it belongs to.
        number: Which part of it.
        payload: What is to be done.
    """

    round: int
    number: int
    payload: dict[str, Any]


def probe(url: str) -> str:
    """Return what a database is, which can be reached and written; nothing is left there.

    Raises:
        MachineError: It cannot.
    """
    engine = sa.create_engine(url, connect_args={"connect_timeout": 20})
    with _clear(engine.url):
        try:
            with engine.connect() as db:
                # Making a table is what the first start does; taken back, it shows the right to.
                with db.begin() as made:
                    _TABLES.create_all(db)
                    made.rollback()
                return f"PostgreSQL {db.scalar(sa.text('SHOW server_version'))}"
        finally:
            engine.dispose()


@contextmanager
def _clear(url: sa.URL) -> Iterator[None]:
    try:
        yield
    except SQLAlchemyError as error:
        what = str(getattr(error, "orig", None) or error).splitlines()[0]
        raise MachineError(
            f"the database {url.render_as_string()} fails: {what}",
            remedy="see that it runs and may be written, then run again to continue",
        ) from error


class Board:
    """The tasks of one job.

    All methods but `close` raise MachineError where the database cannot be reached.
    """

    def __init__(self, url: str, job: str) -> None:
        """Open the table, making it where it is not there.

        Args:
            url: The database, as SQLAlchemy names it.
            job: Name of the job.
        """
        self._url = sa.make_url(url)
        self._job = job
        waits = {"timeout": 60} if self._url.drivername.startswith("sqlite") else {"connect_timeout": 20}
        self._engine = sa.create_engine(self._url, connect_args=waits, pool_pre_ping=True)
        self._lock: sa.Connection | None = None
        with _clear(self._url):
            self._make_table()

    def _make_table(self) -> None:
        try:
            _TABLES.create_all(self._engine)
        except (IntegrityError, ProgrammingError):
            # Another process created the table between our check and our CREATE; now it exists.
            _TABLES.create_all(self._engine)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of all connections, and so of the lead."""
        if self._lock is not None:
            self._lock.close()
        self._engine.dispose()

    @contextmanager
    def _begin(self) -> Iterator[sa.Connection]:
        with _clear(self._url), self._engine.begin() as db:
            yield db
            reached("board:changing")

    # The coordinator

    def lead(self) -> None:
        """Become the job's coordinator, until closed; where the table is a file, whoever holds the job is.

        Raises:
            HeldError: Another one is.
        """
        if self._engine.dialect.name != "postgresql":
            return
        with _clear(self._url):
            self._lock = self._engine.connect().execution_options(isolation_level="AUTOCOMMIT")
            if not self._lock.scalar(sa.text("SELECT pg_try_advisory_lock(hashtext(:job))"), {"job": self._job}):
                raise HeldError(
                    f"job {self._job} is held by another coordinator at {self._url.render_as_string()}",
                    remedy="wait for it, or start `abliterate worker` to help it",
                )

    def say(self, state: str) -> None:
        """Tell workers how the job stands, and that it lives: searching or done."""
        with self._begin() as db:
            mine = _JOBS.c.job == self._job
            told = db.execute(sa.update(_JOBS).where(mine).values(state=state, beat=_JOBS.c.beat + 1))
            if told.rowcount == 0:
                db.execute(sa.insert(_JOBS).values(job=self._job, state=state, beat=0))

    def post(self, rounds: Mapping[int, Sequence[dict[str, Any]]]) -> None:
        """Have the tasks of these rounds there and no others; those that are there already stay as far as they are."""
        wanted = {(round_, n): json.dumps(one) for round_, payloads in rounds.items() for n, one in enumerate(payloads)}
        mine = _TASKS.c.job == self._job
        with self._begin() as db:
            there = db.execute(sa.select(_TASKS.c.round, _TASKS.c.number, _TASKS.c.payload).where(mine))
            for round_, number, payload in there.all():
                if wanted.get((round_, number)) == payload:
                    del wanted[round_, number]
                else:
                    this = (_TASKS.c.round == round_, _TASKS.c.number == number)
                    db.execute(sa.delete(_TASKS).where(mine, *this))
            for (round_, number), payload in wanted.items():
                row = {"job": self._job, "round": round_, "number": number, "payload": payload}
                db.execute(sa.insert(_TASKS).values(**row))

    def results(self, round_: int) -> dict[int, dict[str, Any]]:
        """Return what has come of a round's tasks, by number."""
        wanted = sa.select(_TASKS.c.number, _TASKS.c.result).where(
            _TASKS.c.job == self._job, _TASKS.c.round == round_, _TASKS.c.result.is_not(None)
        )
        with self._begin() as db:
            return {number: json.loads(result) for number, result in db.execute(wanted)}

    def claims(self) -> dict[str, int]:
        """Return the workers that are at a task, with their signs of life so far."""
        wanted = sa.select(_TASKS.c.worker, _TASKS.c.beat).where(
            _TASKS.c.job == self._job, _TASKS.c.worker.is_not(None), _TASKS.c.result.is_(None)
        )
        with self._begin() as db:
            return {row.worker: row.beat for row in db.execute(wanted)}

    def release(self, worker: str) -> None:
        """Free the unfinished tasks of a worker."""
        with self._begin() as db:
            db.execute(sa.update(_TASKS).where(*self._unfinished(worker)).values(worker=None))

    # Workers

    def standing(self) -> tuple[str, int] | None:
        """Return how the job stands and its coordinator's signs of life so far, None before its search."""
        with self._begin() as db:
            row = db.execute(sa.select(_JOBS.c.state, _JOBS.c.beat).where(_JOBS.c.job == self._job)).first()
            return None if row is None else (row.state, row.beat)

    def claim(self, worker: str) -> BoardTask | None:
        """Return the next task that nobody is at, None if there is none."""
        free = (_TASKS.c.job == self._job, _TASKS.c.worker.is_(None), _TASKS.c.result.is_(None))
        found = sa.select(_TASKS.c.round, _TASKS.c.number, _TASKS.c.payload).where(*free)
        while True:
            with self._begin() as db:
                row = db.execute(found.order_by(_TASKS.c.round, _TASKS.c.number).limit(1)).first()
                if row is None:
                    return None
                this = (_TASKS.c.round == row.round, _TASKS.c.number == row.number)
                taken = db.execute(sa.update(_TASKS).where(*free, *this).values(worker=worker))
                if taken.rowcount == 1:
                    return BoardTask(row.round, row.number, json.loads(row.payload))

    def beat(self, worker: str) -> None:
        """Give a sign of life for the task that a worker is at."""
        with self._begin() as db:
            db.execute(sa.update(_TASKS).where(*self._unfinished(worker)).values(beat=_TASKS.c.beat + 1))

    def finish(self, worker: str, task: BoardTask, result: dict[str, Any]) -> bool:
        """Write down what came of a task; return whether it was still the worker's."""
        this = (_TASKS.c.round == task.round, _TASKS.c.number == task.number)
        with self._begin() as db:
            done = db.execute(
                sa.update(_TASKS).where(*self._unfinished(worker), *this).values(result=json.dumps(result))
            )
            return done.rowcount == 1

    def _unfinished(self, worker: str) -> tuple[sa.ColumnElement[bool], ...]:
        return (_TASKS.c.job == self._job, _TASKS.c.worker == worker, _TASKS.c.result.is_(None))
