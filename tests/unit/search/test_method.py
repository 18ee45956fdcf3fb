"""How a job searches, and how many trials it makes: as asked for, as resolved, as its path turned out."""

from __future__ import annotations

from pathlib import Path

import pytest

from job.records import JobRecord, Resolution, SearchMethod
from job.records.edit_path import EditPath
from job.search.method import planned_trials, search_method, trials_wanted
from job.storage.atomic import ensure_folder, write_record
from job.storage.run_folder import RunFolder


def folder_of(path: Path, resolved: SearchMethod | None, *, begun: bool = True) -> RunFolder:
    folder = RunFolder(path)
    record = JobRecord(job_id="0" * 12, identity={}, settings={}, startup_trials=None, versions={})
    if begun:
        resolution = Resolution(dtype="float32", rows=8, layers=4, method=resolved)
        record = record.model_copy(update={"resolution": resolution})
    write_record(folder.job_file, record)
    return folder


def add_path(folder: RunFolder, failed: str | None) -> None:
    ensure_folder(folder.path_file.parent)
    write_record(folder.path_file, EditPath(key="", largest=1.5, prompts=20, stages=(), failed=failed))


@pytest.mark.parametrize(
    ("asked", "resolved", "expected"),
    [
        ("auto", "gradient", "gradient"),
        ("auto", "tpe", "tpe"),
        ("auto", None, "tpe"),  # begun by a former version
        ("gradient", None, "gradient"),
        ("gradient", "tpe", "gradient"),
        ("tpe", "gradient", "tpe"),
    ],
)
def test_the_first_start_decides_where_nothing_is_asked_for(
    tmp_path: Path, asked: str, resolved: SearchMethod | None, expected: str
) -> None:
    folder = folder_of(tmp_path, resolved)
    assert search_method(folder, asked) == expected
    # Former versions made as many trials by gradient.
    assert trials_wanted(folder, None, asked) == (24 if resolved and expected == "gradient" else 200)
    assert trials_wanted(folder, 7, asked) == 7


@pytest.mark.parametrize(("failed", "expected"), [(None, 24), ("weights are offloaded", 200)])
def test_the_path_decides_once_it_is_known(tmp_path: Path, failed: str | None, expected: int) -> None:
    folder = folder_of(tmp_path, "gradient")
    add_path(folder, failed)
    for asked in ("auto", "gradient"):
        assert trials_wanted(folder, None, asked) == expected


def test_before_the_first_start_the_plan_is_by_gradient(tmp_path: Path) -> None:
    for folder in (RunFolder(tmp_path / "none"), folder_of(tmp_path, None, begun=False)):
        assert trials_wanted(folder, None, "auto") == planned_trials(None, "auto") == 24
        assert trials_wanted(folder, None, "tpe") == planned_trials(None, "tpe") == 200
