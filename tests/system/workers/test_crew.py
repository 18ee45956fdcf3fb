"""Workers: the same trials as one process, whoever evaluates them and whoever dies."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import optuna
import psutil
import psycopg
import pytest
import sqlalchemy as sa
import torch

from job.errors import HeldError, MachineError
from job.model.loading import LoadedModel
from job.records import EditParameters, KernelParameters, Plan, TrialScores
from job.stages.model import share_of_cores
from job.storage.events import Events
from job.storage.run_folder import RunFolder
from job.workers.board import Board, signs_of_life
from job.workers.crew import Crew, WarmWorkerPool, WorkerOutOfMemory, end, parts_of, result_of
from tests.fakes.postgres import PASSWORD, Postgres, missing
from tests.helpers import (
    Result,
    abliterate,
    environment,
    events,
    job_arguments,
    only_job,
    start,
    stored_trials,
    wait_until,
)

JOB = "0123456789ab"
# Six trials a batch, two of which share their forwards.
LAYOUT = ("--set", "trials_per_batch=6", "--set", "batching.trials=2", "--trials", 24)

needs_postgres = pytest.mark.skipif(missing() is not None, reason=str(missing()))


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    with pytest.MonkeyPatch.context() as patch, Postgres() as server:
        patch.setenv("PGPASSWORD", PASSWORD)
        yield server


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=needs_postgres)])
def board(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Board]:
    shared = request.param == "postgres"
    url = request.getfixturevalue("postgres").url if shared else f"sqlite:///{tmp_path / 'tasks.db'}"
    with Board(url, JOB) as board:
        board.post({})
        yield board


def edit(number: int) -> EditParameters:
    kernel = KernelParameters(max_weight=1.0, max_weight_position=3.0, min_weight=0.1, min_weight_distance=2.0)
    return EditParameters(direction_index=float(number), kernels={"attention": kernel, "mlp": kernel})


def scored(edits: Any, rows: int, whole: bool = False) -> list[TrialScores]:
    return [TrialScores(refusals=int(one.direction_index), broken=int(whole), kl=rows / 7) for one in edits]


# The board


def test_every_task_is_claimed_once(board: Board) -> None:
    board.post({8: [{"part": number} for number in range(40)]})

    def take(worker: str) -> list[int]:
        taken = []
        while (task := board.claim(worker)) is not None:
            assert task.payload == {"part": task.number}
            assert board.finish(worker, task, {"by": worker})
            taken.append(task.number)
        return taken

    with ThreadPoolExecutor(6) as pool:
        taken = list(pool.map(take, map(str, range(6))))
    assert sorted(number for numbers in taken for number in numbers) == list(range(40))
    assert {int(result["by"]) for result in board.results(8).values()} <= set(range(6))
    assert board.results(9) == {}


def test_a_task_that_was_taken_away_cannot_be_finished(board: Board) -> None:
    board.post({0: [{}]})
    task = board.claim("slow")
    assert task is not None
    assert board.claim("other") is None
    board.beat("slow")
    assert board.claims() == {"slow": 1}
    board.release("slow")
    again = board.claim("other")
    assert again == task
    assert not board.finish("slow", task, {"late": True})
    assert board.finish("other", task, {"in": "time"})
    assert board.results(0) == {0: {"in": "time"}}
    # Nor can one whose round is over, although it has the same number in the next.
    board.post({0: [{"other": "content"}]})
    assert not board.finish("other", task, {"of": "the round before"})


def test_jobs_do_not_see_each_other(board: Board) -> None:
    with Board(str(board._url.render_as_string(hide_password=False)), "another-job") as other:
        other.post({0: [{"of": "another"}]})
        board.say("searching")
        assert board.claim("worker") is None
        assert other.standing() is None
        assert other.claim("worker") is not None
    assert board.standing() is not None


@needs_postgres
def test_a_job_has_one_coordinator(postgres: Postgres) -> None:
    with Board(postgres.url, JOB) as first:
        first.lead()
        with Board(postgres.url, JOB) as second, pytest.raises(HeldError, match="another coordinator"):
            second.lead()
        with Board(postgres.url, "another-job") as other:
            other.lead()
    with Board(postgres.url, JOB) as second:
        second.lead()


def test_a_database_that_is_not_there_is_one_clear_error() -> None:
    with pytest.raises(MachineError, match=r"the database postgresql.*fails"):
        Board("postgresql+psycopg://job@127.0.0.1:1/job", JOB)


# The coordinator


@pytest.mark.parametrize("whole", [False, True])
def test_parts_are_put_together_in_order_whoever_scores_them(board: Board, whole: bool) -> None:
    plan = Plan(first=4, parameters=[{}] * 7, rows=9, together=2, whole=whole)
    edits = [edit(number) for number in range(7)]
    parts = parts_of(plan, edits)
    assert [len(part) for part in parts] == [2, 2, 2, 1]
    assert parts_of(plan.model_copy(update={"together": None}), edits) == [edits]
    helped, over = [], threading.Event()

    def help_out() -> None:
        while not over.is_set():
            task = board.claim("helper")
            if task is not None:
                helped.append(task.number)
                edits = [EditParameters.model_validate(one) for one in task.payload["edits"]]
                board.finish("helper", task, result_of(scored(edits, task.payload["rows"], task.payload["whole"])))

    def slowly(edits: Any, rows: int, whole: bool) -> list[TrialScores]:
        time.sleep(0.2)
        return scored(edits, rows, whole)

    thread = threading.Thread(target=help_out)
    thread.start()
    try:
        found = Crew(board, Events(), WarmWorkerPool(0)).scores([(plan, parts)], slowly)
    finally:
        over.set()
        thread.join()
    assert found == scored(edits, 9, whole)
    assert helped


def test_the_part_of_a_silent_worker_goes_to_another_and_one_that_lives_keeps_its(
    board: Board, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = Plan(first=0, parameters=[{}] * 3, rows=1, together=1)
    ready = threading.Barrier(3)

    def hold(name: str, alive: bool) -> None:
        while (task := board.claim(name)) is None:
            time.sleep(0.001)
        ready.wait()
        if alive:
            for _ in range(8):
                time.sleep(0.25)
                board.beat(name)
            assert board.finish(name, task, result_of([TrialScores(refusals=50, kl=0)]))

    def first(edits: Any, rows: int, whole: bool) -> list[TrialScores]:
        if not ready.broken and ready.n_waiting < 3 and len(scores) == 0:
            ready.wait()
        scores.append(edits)
        return scored(edits, rows)

    scores: list[Any] = []
    threads = [threading.Thread(target=hold, args=("dead", False)), threading.Thread(target=hold, args=("slow", True))]
    for thread in threads:
        thread.start()
    parts = parts_of(plan, [edit(number) for number in range(3)])
    found = Crew(board, Events(), WarmWorkerPool(0), silent_s=1.0).scores([(plan, parts)], first)
    for thread in threads:
        thread.join()
    assert sorted(one.refusals for one in found)[-1] == 50
    assert len(scores) == 2
    assert "dead is silent: its trials go to another" in capsys.readouterr().err


def test_a_worker_out_of_memory_is_told(board: Board) -> None:
    def fail() -> None:
        while (task := board.claim("small")) is None:
            time.sleep(0.001)
        board.finish("small", task, {"out_of_memory": "2 GiB were asked for"})

    def here(edits: Any, rows: int, whole: bool) -> list[TrialScores]:
        thread.join()
        return scored(edits, rows)

    thread = threading.Thread(target=fail)
    thread.start()
    plan = Plan(first=0, parameters=[{}] * 2, rows=1, together=1)
    with pytest.raises(WorkerOutOfMemory, match="2 GiB"):
        Crew(board, Events(), WarmWorkerPool(0)).scores([(plan, parts_of(plan, [edit(0), edit(1)]))], here)


def workers_of(run: int) -> list[psutil.Process]:
    living = [child for child in psutil.Process(run).children() if child.status() != psutil.STATUS_ZOMBIE]
    return [child for child in living if any("job.cli.worker" in part for part in child.cmdline())]


def test_hands_end_when_they_are_not_needed_and_with_the_run() -> None:
    with WarmWorkerPool(2) as hands:
        idle = workers_of(os.getpid())
        assert len(idle) == 2
        given = hands.give({}, "3")  # one that sees a device is started for it
        assert given not in idle
        assert psutil.Process(given.pid).environ()["CUDA_VISIBLE_DEVICES"] == "3"
        end([given])
    assert not any(process.is_running() for process in idle)
    script = (
        "from job.workers.crew import WarmWorkerPool; import sys\n"
        "WarmWorkerPool(1); print(flush=True); sys.stdin.read()"
    )
    run = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert run.stdout is not None
    run.stdout.readline()
    (orphan,) = workers_of(run.pid)
    run.kill()
    run.communicate()
    orphan.wait(20)


def test_a_job_whose_hand_has_died_goes_on_alone(board: Board, tmp_path: Path) -> None:
    with WarmWorkerPool(1) as hands:
        (hand,) = workers_of(os.getpid())
        hand.kill()
        hand.wait(10)
        crew = Crew(board, Events(), hands)
        crew.start(RunFolder(tmp_path / JOB), "sqlite:///nowhere.db", None)
        plan = Plan(first=0, parameters=[{}] * 2, rows=1, together=1)
        edits = [edit(0), edit(1)]
        assert crew.scores([(plan, parts_of(plan, edits))], scored) == scored(edits, 1)
        crew.dismiss()


@pytest.mark.slow
@pytest.mark.xdist_group("workers")
def test_a_hand_loads_the_models_code_before_it_has_work_and_leaves_what_is_no_model_to_preflight(
    organism: Path, tmp_path: Path
) -> None:
    code = "transformers.models.llama.modeling_llama"
    script = f"import sys; from job.cli.worker import main; main(); print({code!r} in sys.modules)"
    for folder, is_model in ((organism / "model", True), (tmp_path, False)):
        hand = [sys.executable, "-c", script, str(folder)]
        done = subprocess.run(hand, input="", capture_output=True, text=True, env=environment())
        assert (done.returncode, done.stdout.strip(), done.stderr) == (0, str(is_model), "")


def test_processes_on_a_cpu_share_its_cores() -> None:
    threads = torch.get_num_threads()
    on_cpu, on_gpu = (cast(LoadedModel, SimpleNamespace(device=torch.device(kind))) for kind in ("cpu", "cuda"))
    try:
        torch.set_num_threads(6)
        for loaded, processes, expected in (
            (on_cpu, 1, 6),
            (on_cpu, 4, 1),
            (on_cpu, 3, 2),
            (on_cpu, 8, 1),
            (on_gpu, 3, 6),
        ):
            with share_of_cores(loaded, processes):
                assert torch.get_num_threads() == expected
            assert torch.get_num_threads() == 6
    finally:
        torch.set_num_threads(threads)


def test_who_is_free_begins_with_the_plan_after(board: Board) -> None:
    first, second = (Plan(first=number, parameters=[{}] * 2, rows=number + 1, together=1) for number in (0, 2))
    rounds = [(plan, parts_of(plan, [edit(plan.first), edit(plan.first + 1)])) for plan in (first, second)]
    slow = threading.Event()

    def help_out() -> None:
        while (task := board.claim("helper")) is None:
            time.sleep(0.001)
        slow.wait()
        edits = [EditParameters.model_validate(one) for one in task.payload["edits"]]
        board.finish("helper", task, result_of(scored(edits, task.payload["rows"], task.payload["whole"])))

    def here(edits: Any, rows: int, whole: bool) -> list[TrialScores]:
        while not done and "helper" not in board.claims():
            time.sleep(0.001)
        done.append(rows)
        if len(done) == 3:  # all that the helper has left, of either plan
            slow.set()
        return scored(edits, rows)

    done: list[int] = []
    thread = threading.Thread(target=help_out)
    thread.start()
    crew = Crew(board, Events(), WarmWorkerPool(0))
    try:
        assert crew.scores(rounds, here) == scored([edit(0), edit(1)], 1)
        assert done == [1, 3, 3]
        # What has been done of the second is not done again.
        assert crew.scores(rounds[1:], here) == scored([edit(2), edit(3)], 3)
        assert len(done) == 3
    finally:
        slow.set()
        thread.join()


def test_signs_of_life_survive_a_database_that_fails_for_a_moment() -> None:
    given: list[int] = []

    def give() -> None:
        given.append(1)
        if len(given) == 1:
            raise MachineError("down for a moment")

    with signs_of_life(give):
        time.sleep(4.6)
    assert len(given) == 2


# Whole jobs


def told(workspace: Path, event: str = "trial") -> int:
    return sum(path.read_text().count(f'"event": "{event}"') for path in workspace.glob("*/events.jsonl"))


def checks(result: Result) -> dict[str, Any]:
    return {check["name"]: check for check in json.loads(result.out)["checks"]}


def manifest(workspace: Path) -> Any:
    return json.loads((only_job(workspace) / "export" / "manifest.json").read_text())


@pytest.fixture(scope="module")
def alone(organism: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a workspace whose job one process has done."""
    workspace = tmp_path_factory.mktemp("alone") / "runs"
    abliterate("run", *job_arguments(organism), *LAYOUT, "--workspace", workspace).check()
    return workspace


@pytest.mark.slow
@pytest.mark.xdist_group("workers")
def test_three_processes_make_the_trials_of_one_also_when_one_is_killed(
    organism: Path, alone: Path, tmp_path: Path
) -> None:
    workspace = tmp_path / "runs"
    process = start("run", *job_arguments(organism), *LAYOUT, "--workers", 3, "--workspace", workspace)
    wait_until(lambda: told(workspace, "worker_started") == 2, process)
    workers = psutil.Process(process.pid).children()
    assert len(workers) == 2
    wait_until(lambda: told(workspace) >= 6, process)
    workers[0].kill()
    err = process.communicate(timeout=200)[1]
    assert process.returncode == 0, err
    assert "warning: worker-1 has died (exit code -9)" in err
    assert stored_trials(workspace) == stored_trials(alone)
    assert manifest(workspace) == manifest(alone)
    assert not any(worker.is_running() for worker in workers)


@pytest.mark.slow
@pytest.mark.xdist_group("workers")
def test_workers_do_not_outlive_a_killed_run_which_goes_on_alone(organism: Path, alone: Path, tmp_path: Path) -> None:
    workspace = tmp_path / "runs"
    job = ["run", *job_arguments(organism), *LAYOUT, "--workspace", workspace]
    process = start(*job, "--workers", 2)
    wait_until(lambda: told(workspace) >= 6, process)
    (worker,) = psutil.Process(process.pid).children()
    process.kill()
    process.communicate()
    worker.wait(10)
    abliterate(*job).check()
    assert stored_trials(workspace) == stored_trials(alone)
    assert manifest(workspace) == manifest(alone)


@pytest.mark.slow
@pytest.mark.xdist_group("workers")
def test_what_is_asked_ahead_is_the_same_with_workers_and_after_a_kill(organism: Path, tmp_path: Path) -> None:
    job = ["run", *job_arguments(organism), *LAYOUT, "--set", "search.ahead=1", "--workspace"]
    abliterate(*job, tmp_path / "alone").check()
    process = start(*job, tmp_path / "runs", "--workers", 2)
    wait_until(lambda: told(tmp_path / "runs") >= 6, process)
    process.kill()
    process.communicate()
    abliterate(*job, tmp_path / "runs", "--workers", 3).check()
    assert stored_trials(tmp_path / "runs") == stored_trials(tmp_path / "alone")
    assert manifest(tmp_path / "runs") == manifest(tmp_path / "alone")


@pytest.mark.slow
@pytest.mark.xdist_group("workers")
def test_a_job_asked_to_stop_ends_its_workers(organism: Path, tmp_path: Path) -> None:
    workspace = tmp_path / "runs"
    process = start("run", *job_arguments(organism), *LAYOUT, "--workers", 2, "--workspace", workspace)
    wait_until(lambda: told(workspace, "worker_started") == 1, process)
    (worker,) = psutil.Process(process.pid).children()
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 75
    assert not worker.is_running()


@needs_postgres
def test_who_open_a_new_database_at_once_all_find_its_table(postgres: Postgres) -> None:
    engine, count = sa.create_engine(postgres.url, connect_args={"password": PASSWORD}), 8
    for _ in range(5):
        with engine.begin() as db:
            db.execute(sa.text("DROP SCHEMA public CASCADE"))
            db.execute(sa.text("CREATE SCHEMA public"))
        together = threading.Barrier(count)

        def opened(together: threading.Barrier = together) -> dict[int, Any]:
            together.wait()
            with Board(postgres.url, JOB) as board:
                return board.results(0)

        with ThreadPoolExecutor(count) as pool:
            assert [one.result() for one in [pool.submit(opened) for _ in range(count)]] == [{}] * count
    engine.dispose()


@pytest.mark.slow
@pytest.mark.xdist_group("workers")
@needs_postgres
def test_another_machine_helps_through_the_database_and_a_third_takes_over(
    organism: Path, alone: Path, postgres: Postgres, tmp_path: Path
) -> None:
    mirror, env = (tmp_path / "mirror").as_uri(), {"PGPASSWORD": PASSWORD}
    job: list[Any] = ["run", *job_arguments(organism), *LAYOUT, "--set", f"database={postgres.url}"]
    job += ["--checkpoint", mirror]
    first = start(*job, "--workspace", tmp_path / "first", **env)
    database = ("--set", f"database={postgres.url}")
    helping = start("worker", "--checkpoint", mirror, "--workspace", tmp_path / "helping", *database, **env)
    wait_until(lambda: told(tmp_path / "first") >= 6, first, helping)
    name = only_job(tmp_path / "first").name
    # The lead is PostgreSQL's: nobody else gets it, whatever workspace and checkpoint they have.
    first.send_signal(signal.SIGSTOP)  # so that it does not end meanwhile
    second = abliterate(*job[:-2], "--workspace", tmp_path / "second", **env)
    second.fails(4, "another coordinator")
    first.kill()
    first.communicate()
    # Nothing but the database: the study is there, and whoever is still helping goes on.
    third = start(*job[:-2], "--workspace", tmp_path / "third", **env)
    said = third.communicate(timeout=200)[1]
    assert third.returncode == 0, said
    (began,) = [event for event in events(tmp_path / "third") if event["event"] == "search_started"]
    assert began["done"] >= 6
    helped = helping.communicate(timeout=60)[1]
    assert helping.returncode == 0, helped
    assert "the search is done" in helped
    assert stored_trials(tmp_path / "third") == stored_trials(alone)
    assert manifest(tmp_path / "third") == manifest(alone)
    storage = optuna.storages.RDBStorage(postgres.url)
    study = optuna.load_study(study_name=name, storage=storage)
    assert [dict(enumerate(trial.values)) for trial in study.trials] == [one["values"] for one in stored_trials(alone)]
    storage.remove_session()
    storage.engine.dispose()
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or PASSWORD.encode() not in path.read_bytes(), path
    assert PASSWORD not in said + helped + second.err


@pytest.mark.slow
@pytest.mark.xdist_group("workers")
@needs_postgres
def test_a_database_that_goes_down_stops_the_job_and_loses_nothing(organism: Path, alone: Path, tmp_path: Path) -> None:
    job = ["run", *job_arguments(organism), *LAYOUT, "--workspace", tmp_path / "runs"]
    with Postgres() as server:
        job += ["--set", f"database={server.url}"]
        address = {"host": "127.0.0.1", "port": server.port, "user": "job", "dbname": "job", "password": PASSWORD}
        checked = abliterate("preflight", *job[1:], "--json", PGPASSWORD=PASSWORD).check()
        assert "PostgreSQL" in checks(checked)["database"]["measured"]
        with psycopg.connect(**address) as db:
            assert db.execute("SELECT count(*) FROM pg_tables WHERE schemaname = 'public'").fetchone() == (0,)
        wrong = abliterate("preflight", *job[1:], "--json", PGPASSWORD="not-the-password")
        assert (wrong.code, checks(wrong)["database"]["status"]) == (76, "fail")
        process = start(*job, PGPASSWORD=PASSWORD)
        wait_until(lambda: told(tmp_path / "runs") >= 6, process)
        process.send_signal(signal.SIGSTOP)  # lest it is done before the server is
        server.stop()
        process.send_signal(signal.SIGCONT)
        err = process.communicate(timeout=60)[1]
        assert process.returncode == 76, err
        assert "database" in next(line for line in err.splitlines() if line.startswith("error: "))
        server.start()
        abliterate(*job, PGPASSWORD=PASSWORD).check()
        with psycopg.connect(**address) as db:
            assert db.execute("SELECT count(*) FROM trials").fetchone() == (24,)
    assert stored_trials(tmp_path / "runs") == stored_trials(alone)


def test_a_password_in_the_address_and_other_databases_are_refused(tmp_path: Path) -> None:
    for url, what in (
        ("postgresql+psycopg://me:secret@host/db", "PGPASSWORD"),
        ("postgresql+psycopg://me@host/db?password=secret", "PGPASSWORD"),
        ("mysql://host/db", "postgresql+psycopg://USER@HOST/NAME"),
    ):
        refused = abliterate("config", "show", "--set", f"database={url}")
        refused.fails(2, what)
        assert "secret" not in refused.err


def test_a_worker_for_a_job_without_a_database_is_told_what_to_do(finished: Path) -> None:
    abliterate("worker", "--workspace", finished).fails(2, "no database", "--set database=")
    abliterate("worker", "--workspace", finished.parent, "--wait", 0).fails(76, "no sign of life")
