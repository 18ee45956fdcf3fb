"""A job's name: what was asked for, whatever the machine decides."""

from __future__ import annotations

from typing import Any

from job.config.load import load_settings
from job.records import JobRecord, Resolution
from job.storage.identity import identify, job_id, stored


def named(*assignments: str) -> str:
    return job_id(identify(load_settings({"model": "me/model"}, assignments=list(assignments)).settings, write=False))


def test_what_the_workers_decide_is_no_part_of_a_jobs_name_and_former_jobs_keep_theirs() -> None:
    assert named() == named("trials_per_batch=4") == named("search.ahead=0") == named("workers=3")
    assert len({named(), named("trials_per_batch=8"), named("search.ahead=1"), named("seed=1")}) == 4


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
