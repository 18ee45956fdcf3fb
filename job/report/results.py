"""What a run came to, read from its folder alone."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from job.config.load import default_values, merged
from job.config.schema import Settings
from job.data.prompts import PromptSets
from job.errors import JobError, UsageError
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
    """Return the finished trials of a job, with refusals at full length where these have been counted.

    Of a job that only makes an edit again, it is that edit's trial.

    Raises:
        JobError: The study cannot be read.
    """
    if folder.reproduces_file.exists() and not folder.read_job().searches:
        return [read_record(folder.reproduces_file, Reproduction).trial]
    return with_full_counts(read_trials(folder.study_file), read_full_counts(folder))


def search_space(folder: RunFolder, name: str, layers: int, directions: int = 1) -> Space:
    """Return the space that a job's trials are from: that around its path, or where it has none that of kernels.

    Args:
        folder: The run folder.
        name: Name of the space of kernels.
        layers: Number of layers.
        directions: Directions of each layer's basis; trials can be read without.

    Raises:
        JobError: The file of the path cannot be read.
    """
    if folder.path_file.exists():
        path = read_record(folder.path_file, EditPath)
        if path.failed is None:
            return PathSpace(path)
    return SearchSpace(name, layers, directions)


def trial_edit(folder: RunFolder, name: str, layers: int, trial: Trial) -> EditParameters:
    """Return the edit of a trial; the parameters are those of `search_space`.

    Raises:
        JobError: The run folder does not hold what it was made from.
    """
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
    """What a finished run's folder says of it.

    Attributes:
        record: job.json.
        export: Name of the export's folder.
        prompts: prompts.json.
        trials: The trials of the study.
        rescored: Those of them whose refusals were counted again at full length.
        chosen: The chosen one.
        edit: Its edit.
        base: Figures of the base model on the report split.
        edited: Figures of the export on it.
        detectors: What detectors say of both models' answers; None where none was asked.
        geometry: How the residuals of good and bad prompts lie.
        preflight: What the latest preflight found, by name, status and what was measured; all but what was in order.
        allowed: Checks that might fail, by the user's word.
        machines: Which hardware computed which trials.
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
        """What makes the result doubtful, in words."""
        searched = search_warnings(self.trials, len(self.prompts.bad_search)) if self.record.searches else []
        return searched + effect_warnings(self.base, self.edited)

    @classmethod
    def read(cls, folder: RunFolder) -> RunResult:
        """Read a run folder.

        Raises:
            UsageError: Nothing has been exported yet.
        """
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
    """Return the finished trials; none of a damaged study, of which the search will tell."""
    try:
        return job_trials(folder)
    except JobError:
        return []
