"""Damaged files of a run folder: one line, one exit code, a remedy, never a traceback."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cases import BRIEF, write_brief
from tests.helpers import Result, abliterate, job_arguments, only_job, stored_trials

FILES = (
    *("job.json", "study.db", "events.jsonl", "uploads.json", "state.json", "prompts.json", "preflight.json"),
    *("meter.json", "holder.json", "figures/base.json", "figures/trial-????.json", "figures/rescored.json"),
    "figures/finalists.json",
    *("answers/base.json", "directions/*.safetensors", "directions/geometry.json", "residuals/good*.safetensors"),
    *("exports/*/manifest.json", "exports/*/.done", "exports/*/config.json", "exports/*/model.safetensors"),
    *("exports/*/reproduce.json", "exports/*/tokenizer.json", "report.html", "report.md"),
)


def _truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def _zero(file: Path) -> None:
    file.write_bytes(bytes(file.stat().st_size))


def _write(contents: str) -> Callable[[Path], None]:
    def write(file: Path) -> None:
        file.write_text(contents)

    return write


def _make_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


KINDS: dict[str, Callable[[Path], None]] = {
    "empty": _write(""),
    "truncated": _truncate,
    "zeros": _zero,
    "list": _write("[1]"),
    "object": _write('{"a": 1}'),
    "folder": _make_folder,
    "missing": Path.unlink,
}
COMMANDS = ("status", "front", "report", "resume")


TRIALS = ("--trials", 6, *BRIEF)


@pytest.fixture(scope="session")
def brief(organism: Path, shared: Callable[[str, Callable[[Path], None]], Path]) -> Path:
    """Return an organism with few layers and prompts: how large a damaged file is does not matter; read-only."""
    return shared("very-brief", lambda folder: write_brief(organism, folder))


@pytest.fixture(scope="session")
def whole(brief: Path, shared: Callable[[str, Callable[[Path], None]], Path]) -> Path:
    """Return a workspace with a finished job that has every file of a run folder; read-only."""

    def build(workspace: Path) -> None:
        abliterate("run", *job_arguments(brief), "--workspace", workspace, *TRIALS).check()

    return shared("undamaged", build)


@pytest.fixture
def damaged(whole: Path, tmp_path: Path) -> Callable[[str, str], Path]:
    """Return a function that makes a finished job with one damaged file, and returns the file."""

    def make(name: str, kind: str) -> Path:
        workspace = tmp_path / "runs"
        shutil.rmtree(workspace, ignore_errors=True)
        shutil.copytree(whole, workspace, symlinks=True)
        if name == "uploads.json":
            upload = {"target": "file:///nowhere", "export": "trial-0000", "state": "failed"}
            (only_job(workspace) / name).write_text(json.dumps([upload]))
        [file, *_] = sorted(only_job(workspace).glob(name))
        KINDS[kind](file)
        return file

    return make


def assert_clear(ended: Result, file: Path) -> None:
    """Assert no traceback and, for a failure, one line with a remedy that names the file or its folder."""
    assert "Traceback" not in ended.out + ended.err
    assert ended.code in (0, 76), (ended.code, ended.err)
    if ended.code:
        lines = [line for line in ended.err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, ended.err
        assert file.name in lines[0] or str(file.parent) in lines[0], lines
        assert " — " in lines[0], lines


@pytest.mark.parametrize("name", FILES)
def test_every_command_says_what_is_damaged(name: str, damaged: Callable[[str, str], Path], tmp_path: Path) -> None:
    for number, command in enumerate(COMMANDS):
        # Another kind of damage with each command, all kinds with the files together.
        kind = list(KINDS)[(number + FILES.index(name)) % len(KINDS)]
        if (name, kind) == ("job.json", "missing"):
            continue  # then there is no job
        file = damaged(name, kind)
        assert_clear(abliterate(command, "--workspace", tmp_path / "runs"), file)


def test_a_study_with_more_refusals_than_prompts_is_named(whole: Path, tmp_path: Path) -> None:
    workspace = tmp_path / "runs"
    shutil.copytree(whole, workspace, symlinks=True)
    study = only_job(workspace) / "study.db"
    with sqlite3.connect(study) as db:
        db.execute("UPDATE trial_values SET value = 1000 WHERE objective = 0")
    db.close()
    (study.parent / "figures" / "rescored.json").unlink()  # it would replace the counts
    for command in COMMANDS:
        assert_clear(abliterate(command, "--workspace", workspace), study)
    assert abliterate("front", "--workspace", workspace).code == 76


# To a reader of JSON these are as one cut off; a database and a log are read in other ways.
_NO_JSON = ("empty", "zeros")
CASES = [
    pytest.param(name, kind, marks=pytest.mark.full("kills") if name.endswith("json") and kind in _NO_JSON else ())
    for name in FILES[:13]
    for kind in KINDS
]


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_preflight_and_run_come_to_the_same_verdict(
    name: str, kind: str, damaged: Callable[[str, str], Path], brief: Path, whole: Path, tmp_path: Path
) -> None:
    if (name, kind) == ("job.json", "missing"):
        pytest.skip("then there is no job")
    file = damaged(name, kind)
    words = [*job_arguments(brief), "--workspace", tmp_path / "runs", *TRIALS]
    checked, ran = abliterate("preflight", *words, "--json"), abliterate("run", *words)
    assert_clear(ran, file)
    assert "Traceback" not in checked.err
    assert checked.code == ran.code, (checked.out, ran.err)
    if ran.code:
        [check] = [check for check in json.loads(checked.out)["checks"] if check["status"] == "fail"]
        assert file.name in check["measured"]
        assert check["remedy"]
        return
    # What was repaired is as it was.
    assert stored_trials(tmp_path / "runs") == stored_trials(whole)
    manifests = [(only_job(place) / "export" / "manifest.json").read_bytes() for place in (tmp_path / "runs", whole)]
    assert manifests[0] == manifests[1]
