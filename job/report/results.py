"""Results of a run, read from its folder."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from job.errors import DamagedError
from job.export.reproduction import Reproduction
from job.records import EditParameters, Trial
from job.records.edit_path import EditPath
from job.search.finalists import read_full_counts, with_full_counts
from job.search.path import PathSpace
from job.search.space import SearchSpace, Space
from job.search.study import read_trials
from job.storage.atomic import read_record
from job.storage.run_folder import RunFolder
from job.storage.study_file import BACKUP, count_trials


def job_trials(folder: RunFolder) -> list[Trial]:
    """Return a job's or its original's finished trials, with full-length counts where known. Raises DamagedError."""
    if folder.reproduces_file.exists() and not folder.read_job().searches:
        return [read_record(folder.reproduces_file, Reproduction).trial]
    trials = read_trials(folder.study_file)
    if not trials and count_trials(folder.study_file.with_name(BACKUP)):
        raise DamagedError(
            f"the study {folder.study_file} has lost its trials",
            remedy="run the job again: it restores them from the backup",
        )
    return with_full_counts(trials, read_full_counts(folder))


def search_space(folder: RunFolder, name: str, layers: int, directions: int = 1) -> Space:
    """Return a job's search space: around its path, else of kernels named `name`. Raises JobError."""
    if folder.path_file.exists():
        path = read_record(folder.path_file, EditPath)
        if path.failed is None:
            return PathSpace(path)
    return SearchSpace(name, layers, directions)


def trial_edit(folder: RunFolder, name: str, layers: int, trial: Trial) -> EditParameters:
    """Return a trial's edit; see `search_space`. Raises JobError if the run folder lacks its origin."""
    if folder.reproduces_file.exists():
        original = read_record(folder.reproduces_file, Reproduction)
        if trial == original.trial:
            return original.edit
    return search_space(folder, name, layers).edit(trial.params)


def machines(events: Iterable[Mapping[str, Any]]) -> tuple[tuple[str, str], ...]:
    """Return which trials ran on which hardware, by a run's events: hardware and a range of numbers.

    Workers are named where theirs is of another kind than the run's own.
    """
    found: list[tuple[str, int, int]] = []
    hardware = ""
    for event in events:
        if event.get("event") == "loaded":
            hardware = str(event.get("hardware", ""))
        elif event.get("event") == "worker_started":
            if (other := str(event.get("hardware", ""))) not in hardware:
                hardware += f" and {other}"
        elif event.get("event") == "trial":
            number = int(event["number"])
            if found and found[-1][0] == hardware:
                found[-1] = (hardware, found[-1][1], number)
            else:
                found.append((hardware, number, number))
    return tuple((name or "unknown", f"{first}–{last}" if first < last else f"{first}") for name, first, last in found)


def trials_so_far(folder: RunFolder) -> list[Trial]:
    """Return finished trials; none of a damaged study, which the search reports. Raises MachineError if in use."""
    try:
        return job_trials(folder)
    except DamagedError:
        return []
