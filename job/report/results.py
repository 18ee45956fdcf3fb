"""Results of a run, read from its folder."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from job.config.load import default_values, merged
from job.config.schema import Settings
from job.data.prompts import PromptSets
from job.errors import JobError, MachineError, UsageError
from job.export.reproduction import (
    Reproduction,
)
from job.records import DetectorReport, EditParameters, Figures, GeometryRecord, JobRecord, Trial
from job.search.convergence import effect_warnings, search_warnings
from job.search.finalists import read_full_counts, with_full_counts
from job.search.pareto import choose
from job.search.path import EditPath, PathSpace
from job.search.space import SearchSpace, Space
from job.search.study import read_trials
from job.storage.atomic import read_record
from job.storage.events import read_events
from job.storage.run_folder import RunFolder


def job_trials(folder: RunFolder) -> list[Trial]:
    """Return a job's or its original's finished trials, with full-length counts where known. Raises JobError."""
    if folder.reproduces_file.exists() and not folder.read_job().searches:
        return [read_record(folder.reproduces_file, Reproduction).trial]
    return with_full_counts(read_trials(folder.study_file), read_full_counts(folder))


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


@dataclass(frozen=True)
class RunResult:
    """A finished run's results.

    Attributes:
        rescored: Numbers of trials scored at full length.
        preflight: Name, status and measurement of the latest preflight's checks that are not ok.
        allowed: Checks that the user allowed to fail.
        machines: Hardware of the trials.
    """

    record: JobRecord
    export: str
    prompts: PromptSets
    trials: Sequence[Trial]
    rescored: tuple[int, ...]
    chosen: Trial
    edit: EditParameters
    base: Figures
    edited: Figures
    detectors: DetectorReport | None
    geometry: GeometryRecord
    preflight: tuple[tuple[str, str, str], ...]
    allowed: tuple[str, ...]
    machines: tuple[tuple[str, str], ...]

    @property
    def warnings(self) -> list[str]:
        """Warnings about the result."""
        searched = search_warnings(self.trials, len(self.prompts.bad_search)) if self.record.searches else []
        return searched + effect_warnings(self.base, self.edited)

    @classmethod
    def read(cls, folder: RunFolder) -> RunResult:
        """Read a run folder. Raises UsageError if nothing has been exported yet."""
        record = folder.read_job()
        # What a former version did not know is as it was before.
        settings = Settings(**merged(default_values(), record.settings))
        trials = job_trials(folder)
        prompts = read_record(folder.prompts_file, PromptSets) if folder.prompts_file.exists() else None
        if prompts is None or not trials or record.resolution is None:
            raise UsageError(f"job {record.job_id} has nothing to report yet", remedy="run it first")
        chosen = choose(trials, len(prompts.bad_search), settings.choice.refusal_tolerance)
        export = folder.export_folder(chosen.number, settings.export_format)
        if not folder.figures_file(export.name).exists():
            raise UsageError(f"job {record.job_id} has exported nothing yet", remedy="run it to its end")
        survey = json.loads(folder.preflight_file.read_text()) if folder.preflight_file.exists() else {}
        return cls(
            record=record,
            export=export.name,
            prompts=prompts,
            trials=trials,
            rescored=tuple(sorted(read_full_counts(folder).refusals)),
            chosen=chosen,
            edit=trial_edit(folder, settings.search.space, record.resolution.layers, chosen),
            base=read_record(folder.figures_file("base"), Figures),
            edited=read_record(folder.figures_file(export.name), Figures),
            detectors=_detectors(folder, export.name),
            geometry=read_record(folder.geometry_file, GeometryRecord),
            preflight=tuple(
                (check["name"], check["status"], check["measured"])
                for check in survey.get("checks", ())
                if check["status"] != "ok"
            ),
            allowed=tuple(survey.get("allowed", ())),
            machines=machines(read_events(folder.events_file)),
        )


def _detectors(folder: RunFolder, export: str) -> DetectorReport | None:
    file = folder.detectors_file(export)
    return read_record(file, DetectorReport) if file.exists() else None


def trials_so_far(folder: RunFolder) -> list[Trial]:
    """Return the finished trials; none of a damaged study, which the search reports.

    Raises:
        MachineError: The study is in use.
    """
    try:
        return job_trials(folder)
    except MachineError:
        raise
    except JobError:
        return []
