"""A job's name: what was asked for, whatever the machine decides."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from job.config.load import load_settings
from job.config.schema import Settings
from job.errors import UsageError
from job.records import JobRecord, Resolution
from job.storage.identity import identify, job_id, require_same_scorers, stored


def named(*assignments: str) -> str:
    return job_id(identify(load_settings({"model": "me/model"}, assignments=list(assignments)).settings, write=False))


def test_what_the_workers_decide_is_no_part_of_a_jobs_name_and_former_jobs_keep_theirs() -> None:
    assert named() == named("trials_per_batch=4") == named("search.ahead=0") == named("workers=3")
    assert len({named(), named("trials_per_batch=8"), named("search.ahead=1"), named("seed=1")}) == 4


def test_scorers_are_part_of_a_jobs_name_by_what_they_read(tmp_path: Path) -> None:
    objectives = 'search.objectives=["classifier", "kl"]'
    assert named() == named('search.objectives=["refusals", "kl"]') == named("judge.url=https://here/v1")
    # The name that this command had before there were objectives.
    assert named() == "d8a374c447e1"
    folder = tmp_path / "classifier"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    place = f"scoring.classifier={folder}"
    workspace = f"workspace={tmp_path}"
    first = named(objectives, place, workspace)
    assert named(place) == named()  # no scorer of the search
    (folder / "config.json").write_text("{ }")
    assert len({first, named(objectives, place, workspace), named(objectives, "scoring.classifier=me/it")}) == 3
    judged = 'search.objectives=["judge", "kl"]'
    assert named(judged, "judge.model=a", "judge.url=https://here/v1") == named(judged, "judge.model=a")
    assert len({named(judged, "judge.model=a"), named(judged, "judge.model=b"), named(judged)}) == 3


def test_another_scorer_than_at_the_first_start_is_refused() -> None:
    def settings(model: str) -> Settings:
        asked = ['search.objectives=["judge", "kl"]', f"judge.model={model}"]
        return load_settings({"model": "me/model"}, assignments=asked).settings

    identity = identify(settings("a"), write=False)
    require_same_scorers(identity, settings("a"))
    with pytest.raises(UsageError, match="the scorer judge is not the one"):
        require_same_scorers(identity, settings("b"))


def test_batches_are_those_of_the_first_start_or_of_a_former_version() -> None:
    def batches(assignments: list[str], **resolved: Any) -> tuple[int, int]:
        settings = load_settings({"model": "me/model"}, assignments=assignments).settings
        resolution = Resolution(dtype="float32", rows=8, layers=2, **resolved)
        record = JobRecord(
            job_id="1",
            identity=identify(settings, write=False),
            settings=stored(settings),
            startup_trials=1,
            resolution=resolution,
            versions={},
        )
        return record.trials_per_batch, record.batches_ahead

    assert batches([], batch=12, ahead=1) == (12, 1)
    assert batches(["trials_per_batch=4", "search.ahead=2"], batch=12, ahead=0) == (12, 0)
    assert batches([]) == (4, 0)
    assert batches(["trials_per_batch=7", "search.ahead=2"]) == (7, 2)
