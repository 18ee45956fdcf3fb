"""Faults of storage: a full disk, a damaged or half-written study, torn files."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from job.errors import JobError, MachineError
from job.search.study import read_trials
from job.storage.events import Events
from job.storage.study_file import BACKUP, back_up, is_sound, restore_if_damaged
from tests.fakes.preloaded import preloaded
from tests.helpers import (
    Result,
    abliterate,
    die_while_writing,
    environment,
    events,
    job_arguments,
    only_job,
    start,
    stored_trials,
)
from tests.integration.search.test_optimizer import Runs
from tests.system.faults.test_devices import when_searching

TRIALS = ("--trials", "16")


def test_a_study_whose_writer_was_killed_in_the_middle_is_read_as_it_was_before(tmp_path: Path) -> None:
    file = tmp_path / "study.db"
    whole = Runs().run(file, 6, 2)
    numbers = "WITH RECURSIVE n(i) AS (SELECT 1 UNION SELECT i + 1 FROM n LIMIT 2000)"
    rows = f"{numbers} INSERT INTO ballast SELECT '{'b' * 1000}' FROM n"
    die_while_writing(file, "CREATE TABLE ballast (x)", rows, "DELETE FROM trial_values")
    assert file.with_name("study.db-journal").stat().st_size > 10_000
    assert read_trials(file) == whole
    assert restore_if_damaged(file) is None


@pytest.mark.parametrize("damage", ["truncated", "overwritten", "gone", "emptied", "behind"])
def test_a_damaged_study_is_restored_and_the_search_goes_on_as_if_nothing_had_been(tmp_path: Path, damage: str) -> None:
    whole = Runs().run(tmp_path / "whole.db", 14, 4)
    folder = tmp_path / "job"
    folder.mkdir()
    file = folder / "study.db"
    Runs().run(file, 8, 4)
    if damage == "gone":
        file.unlink()
    elif damage == "emptied":
        file.write_bytes(b"")  # to SQLite a new database
    elif damage == "behind":
        shutil.copy(file.with_name(BACKUP), tmp_path / "kept.db")
        file.unlink()
        Runs().run(file, 4, 4)
        shutil.copy(tmp_path / "kept.db", file.with_name(BACKUP))
    else:
        with file.open("rb+") as stream:
            if damage == "truncated":
                stream.truncate(file.stat().st_size // 2)
            else:
                stream.seek(4096)
                stream.write(os.urandom(3 * 4096))
    assert damage in ("emptied", "behind") or not (file.exists() and is_sound(file))
    told = restore_if_damaged(file)
    assert told is not None
    assert "with 8 trials" in told
    assert Runs().run(file, 14, 4) == whole
    assert file.with_name("study.damaged.db").exists() == (damage != "gone")


def test_a_damaged_study_without_a_backup_is_a_clear_stop(tmp_path: Path) -> None:
    file = tmp_path / "study.db"
    Runs().run(file, 4, 4)
    file.with_name(BACKUP).write_bytes(b"torn")
    file.write_bytes(os.urandom(20_000))
    with pytest.raises(JobError, match="is damaged and has no backup"):
        restore_if_damaged(file)
    assert file.exists()


@pytest.mark.parametrize("told", [True, False])
def test_an_emptied_study_without_a_backup_is_a_new_one_only_if_no_trial_was_told(tmp_path: Path, told: bool) -> None:
    file = tmp_path / "study.db"
    file.write_bytes(b"")
    Events(tmp_path / "events.jsonl").emit("trial" if told else "phase", number=0)
    if not told:
        assert restore_if_damaged(file) is None
        return
    with pytest.raises(JobError, match="is damaged and has no backup"):
        restore_if_damaged(file)


def test_a_backup_is_not_replaced_by_a_study_that_lost_trials(tmp_path: Path) -> None:
    file = tmp_path / "study.db"
    Runs().run(file, 8, 4)
    kept = file.with_name(BACKUP).read_bytes()
    file.unlink()
    (tmp_path / "other").mkdir()
    Runs().run(tmp_path / "other" / "study.db", 4, 4)
    shutil.copy(tmp_path / "other" / "study.db", file)
    with pytest.raises(MachineError, match="holds 4 of 8 finished trials"):
        back_up(file, file.with_name(BACKUP), 8)
    assert file.with_name(BACKUP).read_bytes() == kept


HOLD = """
import sqlite3, sys, time
db = sqlite3.connect(sys.argv[1])
db.execute("BEGIN EXCLUSIVE")
print("held", flush=True)
time.sleep(float(sys.argv[2]))
"""


@contextmanager
def held_by_another(study: Path, seconds: float) -> Iterator[int]:
    """Have another process lock a study; yield its id."""
    with subprocess.Popen([sys.executable, "-c", HOLD, study, str(seconds)], stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        try:
            yield other.pid
        finally:
            other.kill()


def test_a_study_in_use_is_waited_for_and_never_taken_for_damaged(
    organism: Path, finished: Path, tmp_path: Path
) -> None:
    trials = len(stored_trials(finished)) + 2
    # Two copies: both commands wait at the same time.
    for name in ("runs", "checked"):
        shutil.copytree(finished, tmp_path / name, symlinks=True)
    job, to_check = only_job(tmp_path / "runs"), only_job(tmp_path / "checked")
    words = [*job_arguments(organism), "--trials", trials, "--workspace"]
    before = (job / "study.db").read_bytes()
    with held_by_another(job / "study.db", 300) as holder, held_by_another(to_check / "study.db", 300) as other:
        running = start("run", *words, tmp_path / "runs")
        checked = abliterate("preflight", *words, tmp_path / "checked", "--json")
        err = running.communicate()[1]
        Result(running.returncode, "", err).fails(76, f"study.db is in use by process {holder} (python")
        told = f"study.db is in use by process {other} (python"
        (check,) = json.loads(checked.out)["checks"]
        assert (checked.code, check["name"], check["status"]) == (76, "job", "fail")
        assert told in check["measured"]
        assert "damaged" not in checked.out + err
    assert (job / "study.db").read_bytes() == before
    assert not (job / "study.damaged.db").exists()
    with held_by_another(job / "study.db", 3):
        ran = abliterate("run", *words, tmp_path / "runs").check()
    assert "damaged" not in ran.err
    assert len(stored_trials(tmp_path / "runs")) == trials


@dataclass(frozen=True)
class Scarce:
    """A folder whose space can be used up and given back, and the environment of processes that write there."""

    folder: Path
    use_up: Callable[[], object]
    give_back: Callable[[], object]
    environment: dict[str, str] = field(default_factory=dict)


@contextmanager
def small_disk(point: Path) -> Iterator[Scarce]:
    """Yield a file system of its own."""
    point.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400m", "none", str(point)], capture_output=True)
    if done.returncode:  # only root may, with that capability; a disk that is really full cannot be had otherwise
        pytest.skip("cannot mount here")
    yield Scarce(point, lambda: fill(point), (point / "ballast").unlink)
    subprocess.run(["umount", "-l", str(point)], check=True)


@contextmanager
def quota(folder: Path) -> Iterator[Scarce]:
    """Yield a folder on a disk with space, whose user has used up the quota."""
    folder.mkdir()
    mark = folder.with_name("used-up")
    library = preloaded("quota", folder.parent)
    given = {"LD_PRELOAD": str(library), "QUOTA_ROOT": str(folder), "QUOTA_USED_UP": str(mark)}
    yield Scarce(folder, mark.touch, mark.unlink, given)


@pytest.fixture(params=[small_disk, quota], ids=["disk", "quota"])
def scarce(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Scarce]:
    with request.param(tmp_path / "scarce") as found:
        yield found


def fill(disk: Path) -> None:
    """Leave not a byte of a disk free."""
    ballast = disk / "ballast"
    with ballast.open("wb", buffering=0) as file:
        for size in (1 << 20, 1 << 12, 1):
            try:
                while True:
                    file.write(b"\0" * size)
            except OSError:
                continue


@pytest.mark.slow
def test_space_that_is_used_up_in_the_search_loses_nothing(organism: Path, whole: Path, scarce: Scarce) -> None:
    workspace = scarce.folder / "runs"
    arguments = ["run", *job_arguments(organism), "--workspace", workspace, "--allow", "disk.storage", *TRIALS]
    process = start(*arguments, **scarce.environment)
    when_searching(workspace, process, 3)
    scarce.use_up()
    assert process.wait(120) == 76
    err = process.communicate()[1]
    assert "Traceback" not in err
    assert "cannot write" in err
    assert len(stored_trials(workspace)) >= 4
    scarce.give_back()
    abliterate(*arguments).check()
    assert stored_trials(workspace) == stored_trials(whole)


@pytest.mark.slow
def test_torn_files_of_a_killed_run_do_no_harm(organism: Path, finished: Path, tmp_path: Path) -> None:
    workspace = tmp_path / "runs"
    shutil.copytree(finished, workspace, symlinks=True)
    job = only_job(workspace)
    whole = stored_trials(workspace)
    for file in (*(job / "residuals").iterdir(), *(job / "directions").glob("*.safetensors")):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with (job / "events.jsonl").open("ab") as log:
        log.write(b'{"time": 1, "event": "tr')
    (job / "holder.json").write_text('{"process"')
    (job / "meter.json").write_text("")
    (job / ".state.json.123.tmp").write_text("half")
    shutil.rmtree(job / "exports")
    arguments = ["run", *job_arguments(organism), "--workspace", workspace, "--trials", 20]
    abliterate(*arguments).check()
    assert stored_trials(workspace) == whole
    manifests = [
        json.loads((only_job(place) / "export" / "manifest.json").read_text()) for place in (workspace, finished)
    ]
    assert manifests[0] == manifests[1]


@pytest.mark.slow
def test_a_stopped_batch_may_end_within_the_grace(organism: Path, tmp_path: Path) -> None:
    workspace = tmp_path / "runs"
    arguments = ["run", *job_arguments(organism), "--workspace", workspace, "--trials", "200"]
    process = start(*arguments, "--grace", "60")
    when_searching(workspace, process, 3)
    done = len(stored_trials(workspace))
    process.send_signal(signal.SIGTERM)
    assert process.wait(100) == 75
    process.communicate()
    trials = len(stored_trials(workspace))
    assert trials > done or trials % 4 == 0
    assert trials % 4 == 0
    assert events(workspace)[-1]["event"] == "job_preempted"
    # Without any the batch is given up.
    process = start(*arguments, "--grace", "0")
    when_searching(workspace, process, trials)
    begin = time.monotonic()
    process.send_signal(signal.SIGTERM)
    assert process.wait(100) == 75
    process.communicate()
    assert time.monotonic() - begin < 5


@pytest.mark.slow
def test_a_budget_ends_the_search_and_its_best_is_exported(organism: Path, tmp_path: Path) -> None:
    workspace = tmp_path / "runs"
    arguments = ["run", *job_arguments(organism), "--workspace", workspace, "--trials", "4000", "--price", "3.6"]
    allowed = ("--allow", "estimate.time", "--allow", "estimate.cost")
    told = abliterate(*arguments, *allowed, "--max-hours", "0.003").check()
    assert "the budget ends the search" in told.err
    status = json.loads(abliterate("status", "--workspace", workspace, "--json").check().out)
    done = status["trials"]["done"]
    assert (status["state"], status["reason"]) == ("finished", "budget")
    assert 0 < done < 4000
    assert (only_job(workspace) / "export" / "model.safetensors").exists()
    spent = json.loads((only_job(workspace) / "meter.json").read_text())
    assert spent["dollars"] == pytest.approx(spent["seconds"] * 0.001, rel=1e-6)
    assert status["cost_usd"] == pytest.approx(spent["dollars"], abs=0.006)
    # The same again has nothing to do; more time makes it go on, and both starts count.
    assert "nothing to do" in abliterate(*arguments, *allowed, "--max-hours", "0.003").check().err
    abliterate(*arguments, *allowed, "--max-cost", str(spent["dollars"] + 0.01)).check()
    assert len(stored_trials(workspace)) > done
    assert json.loads((only_job(workspace) / "meter.json").read_text())["seconds"] > spent["seconds"] + 3


@pytest.mark.slow
def test_a_study_off_the_workspace_is_there_after_every_batch(organism: Path, finished: Path, tmp_path: Path) -> None:
    """As on a network file system, where SQLite must not work."""
    workspace, local = tmp_path / "runs", tmp_path / "local"
    local.mkdir()
    arguments = ["run", *job_arguments(organism), "--workspace", workspace, "--trials", "20"]
    arguments += ["--set", "study_storage=local"]
    process = start(*arguments, TMPDIR=str(local))
    when_searching(workspace, process, 5)
    process.kill()
    process.communicate()
    found = len(stored_trials(workspace))
    assert found >= 4
    assert found % 4 == 0
    assert not list(workspace.glob("*/study.db-journal"))
    # The machine with its disk is gone.
    shutil.rmtree(local)
    local.mkdir()
    abliterate(*arguments, TMPDIR=str(local)).check()
    assert stored_trials(workspace) == stored_trials(finished)


WRITE_STUDY = """
import sys
from pathlib import Path
from job.errors import MachineError
from job.search.study import add_trials, clear_write_errors, file_url, open_study
import optuna
file, mark = Path(sys.argv[1]), Path(sys.argv[2])
study = open_study(file_url(file), "abliterate")
mark.touch()
try:
    with clear_write_errors(file):
        add_trials(study, [optuna.trial.create_trial(values=[1.0, 0.5]) for _ in range(400)])
except MachineError as error:
    print(error.exit_code, error.line)
"""


def test_a_used_up_quota_is_named_where_sqlite_says_input_output_error(tmp_path: Path) -> None:
    with quota(tmp_path / "scarce") as scarce:
        file = scarce.folder / "study.db"
        mark = scarce.environment["QUOTA_USED_UP"]
        words = [sys.executable, "-c", WRITE_STUDY, str(file), mark]
        done = subprocess.run(words, capture_output=True, text=True, env=environment(**scarce.environment))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"76 cannot write {file}: Disk quota exceeded — remove files there"), done.stdout
