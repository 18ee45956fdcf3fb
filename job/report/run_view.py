"""A run folder's contents for reports, at any stage of the job."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from job.config.load import default_values, merged
from job.config.schema import Settings
from job.data.prompts import PromptSets
from job.errors import JobError
from job.records import (
    DetectorReport,
    EditParameters,
    Figures,
    GeometryRecord,
    JobRecord,
    KeptAnswers,
    Record,
    State,
    Trial,
    Upload,
)
from job.report.results import job_trials, machines, trial_edit
from job.report.timings import PhaseTime, phase_times
from job.search.budget import Spent, read_spent
from job.search.convergence import effect_warnings, search_warnings
from job.search.pareto import choose
from job.search.path import EditPath
from job.storage.answers import read_answers
from job.storage.atomic import read_record
from job.storage.events import read_events
from job.storage.run_folder import RunFolder

R = TypeVar("R", bound=Record)


@dataclass(frozen=True)
class RunView:
    """A run folder's contents; missing parts are None or empty.

    Attributes:
        chosen: The chosen trial, or the current best.
        export: Name of its measured export's folder.
        path: The edits that the gradient found; None where the search had no such path.
        checks: Checks of the latest preflight.
    """

    record: JobRecord
    state: State | None
    prompts: PromptSets | None
    trials: Sequence[Trial]
    chosen: Trial | None
    edit: EditParameters | None
    export: str | None
    base: Figures | None
    edited: Figures | None
    detectors: DetectorReport | None
    answers: tuple[KeptAnswers, KeptAnswers] | None
    geometry: GeometryRecord | None
    path: EditPath | None
    checks: Sequence[dict[str, Any]]
    phases: Sequence[PhaseTime]
    spent: Spent
    machines: tuple[tuple[str, str], ...]
    uploads: Sequence[Upload]

    @property
    def warnings(self) -> list[str]:
        """Warnings about the result."""
        if self.base is None or self.edited is None:
            return []
        found = effect_warnings(self.base, self.edited)
        if self.record.searches and self.prompts is not None:
            found = search_warnings(self.trials, len(self.prompts.bad_search)) + found
        return found

    @classmethod
    def read(cls, folder: RunFolder, state: State | None = None) -> RunView:
        """Read a run folder; `state` overrides its state.json. Raises JobError without a readable job.json."""
        record = folder.read_job()
        prompts = _read(folder.prompts_file, PromptSets)
        trials = _trials(folder)
        chosen, edit, export = _choice(folder, record, prompts, trials)
        events = read_events(folder.events_file)
        figures = [_read(folder.figures_file(name), Figures) if export else None for name in ("base", export or "")]
        answers = [read_answers(folder, name) if export else None for name in ("base", export or "")]
        survey = json.loads(folder.preflight_file.read_text()) if folder.preflight_file.exists() else {}
        return cls(
            record=record,
            state=state or folder.read_state(),
            prompts=prompts,
            trials=trials,
            chosen=chosen,
            edit=edit,
            export=export if figures[1] else None,
            base=figures[0],
            edited=figures[1],
            detectors=_read(folder.detectors_file(export), DetectorReport) if export else None,
            answers=(answers[0], answers[1]) if answers[0] and answers[1] else None,
            geometry=_read(folder.geometry_file, GeometryRecord),
            path=_read(folder.path_file, EditPath),
            checks=survey.get("checks", ()),
            phases=phase_times(events),
            spent=read_spent(folder.meter_file),
            machines=machines(events),
            uploads=folder.read_uploads(),
        )


def _read(file: Any, kind: type[R]) -> R | None:
    try:
        return read_record(file, kind)
    except JobError:
        return None


def _trials(folder: RunFolder) -> list[Trial]:
    try:
        return job_trials(folder)
    except JobError:
        return []  # a damaged study, which the state reports


def _choice(
    folder: RunFolder, record: JobRecord, prompts: PromptSets | None, trials: Sequence[Trial]
) -> tuple[Trial | None, EditParameters | None, str | None]:
    """Return the chosen trial, its edit and the name of its export."""
    if prompts is None or record.resolution is None:
        return None, None, None
    try:
        # Settings unknown to a former version have their former defaults.
        settings = Settings(**merged(default_values(), record.settings))
        chosen = choose(trials, len(prompts.bad_search), settings.choice.refusal_tolerance)
        edit = trial_edit(folder, settings.search.space, record.resolution.layers, chosen)
    except (JobError, KeyError, ValueError):
        return None, None, None  # no trial could be scored, or the settings are another version's
    return chosen, edit, folder.export_folder(chosen.number, settings.export_format).name
