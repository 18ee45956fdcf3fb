"""Which search a job makes, and how many trials where none are asked for. Needs no torch."""

from __future__ import annotations

from job.records import JobRecord, SearchMethod
from job.records.edit_path import EditPath
from job.storage.atomic import read_record
from job.storage.run_folder import RunFolder

# Around edits found by gradient, a few trials are enough: docs/decisions/0043-gradient-by-default.md.
DEFAULT_TRIALS: dict[SearchMethod, int] = {"gradient": 24, "tpe": 200}


def planned_trials(trials: int | None, asked: str) -> int:
    """Return how many trials a job is expected to make before its first start."""
    return trials if trials is not None else DEFAULT_TRIALS[first_method(asked)]


def first_method(asked: str) -> SearchMethod:
    """Return the method that a job's first start resolves from the setting `search.method`."""
    return "tpe" if asked == "tpe" else "gradient"


def planned_method(record: JobRecord | None, asked: str) -> SearchMethod:
    """Return the method that a job begins its search with; jobs of former versions know only what was asked for."""
    if asked != "auto" or record is None or record.resolution is None:
        return first_method(asked)
    return record.resolution.method or "tpe"


def search_method(folder: RunFolder, asked: str) -> SearchMethod:
    """Return a job's method: "tpe" also where its path failed. Raises DamagedError."""
    if folder.path_file.exists():
        return "gradient" if read_record(folder.path_file, EditPath).failed is None else "tpe"
    return planned_method(folder.read_job() if folder.job_file.exists() else None, asked)


def trials_wanted(folder: RunFolder, trials: int | None, asked: str) -> int:
    """Return how many trials a job's search makes: `trials` if given, else by its method. Raises DamagedError.

    Former versions made as many by gradient as by TPE.
    """
    if trials is not None:
        return trials
    resolution = folder.read_job().resolution if folder.job_file.exists() else None
    of_former_version = resolution is not None and resolution.method is None
    return DEFAULT_TRIALS["tpe" if of_former_version else search_method(folder, asked)]
