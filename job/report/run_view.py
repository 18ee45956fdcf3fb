"""A run folder's contents for status, front and reports, at any stage of the job."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from job.config.load import default_values, merged
from job.config.sections import asked_method
from job.data.prompts import PromptSets
from job.errors import JobError
from job.records import (
    FORMATS,
    REFUSALS,
    ChoiceFigures,
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
from job.records.edit_path import EditPath
from job.records.evaluation import Benchmarks
from job.report.results import job_trials, machines, trial_edit
from job.report.timings import PhaseTime, phase_times, time_spent
from job.search.budget import Spent, read_spent
from job.search.choice import Choice, job_choice
from job.search.convergence import effect_warnings, search_warnings
from job.search.finalists import read_full_counts
from job.search.method import planned_trials, trials_wanted
from job.search.pareto import pareto_front
from job.storage.answers import read_answers
from job.storage.atomic import read_record
from job.storage.events import read_events
from job.storage.run_folder import RunFolder
from job.text.behaviour import BehaviourWords, words_in

_SURVEY = TypeAdapter(dict[str, Any])
T = TypeVar("T")
R = TypeVar("R", bound=Record)


@dataclass(frozen=True)
class RunResult:
    """The chosen trial with its measured export, named by the export's folder."""

    prompts: PromptSets
    chosen: Trial
    edit: EditParameters
    export: str
    base: Figures
    edited: Figures


@dataclass(frozen=True)
class RunView:
    """A run folder's contents. Each file is read once, when first needed; missing parts are None or empty.

    Properties raise JobError for a damaged file.

    Attributes:
        final_state: Overrides state.json.
        lenient: Treat damaged files as missing, for a report about the damage.
    """

    folder: RunFolder
    final_state: State | None = None
    lenient: bool = False

    @cached_property
    def record(self) -> JobRecord:
        """job.json, which is never missing."""
        return self.folder.read_job()

    @cached_property
    def state(self) -> State | None:
        """The job's latest state."""
        return self.final_state or self.folder.read_state()

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The job's settings, with defaults for those unknown to the version that wrote them."""
        return merged(default_values(), self.record.settings)

    @cached_property
    def words(self) -> BehaviourWords:
        """The behaviour in words."""
        return words_in(self.settings)

    @cached_property
    def prompts(self) -> PromptSets | None:
        """The prompts of all splits."""
        return self._part(self.folder.prompts_file, PromptSets)

    @cached_property
    def trials(self) -> Sequence[Trial]:
        """The finished trials, with full-length counts where known."""
        return self._readable(lambda: job_trials(self.folder), [])

    @cached_property
    def trials_wanted(self) -> int:
        """How many trials the search makes."""
        asked, method = self.settings.get("trials"), asked_method(self.settings["search"])
        return self._readable(lambda: trials_wanted(self.folder, asked, method), planned_trials(asked, method))

    @cached_property
    def compared(self) -> Sequence[Trial]:
        """The trials that the front is drawn from; see `Choice.compared`."""
        return self.trials if self.choice is None else self.choice.compared(self.trials)

    @cached_property
    def front(self) -> Sequence[Trial]:
        """The Pareto-optimal trials."""
        return pareto_front(self.compared)

    @cached_property
    def rescored(self) -> Sequence[int]:
        """Numbers of the trials scored at full length."""
        return sorted(read_full_counts(self.folder).refusals)

    @cached_property
    def choice(self) -> Choice | None:
        """How the trial is chosen, with what is measured of finalists; None without prompts."""
        prompts, tolerance = self.prompts, self.settings["choice"]["refusal_tolerance"]
        if prompts is None:
            return None
        return self._readable(lambda: job_choice(self.folder, self.record, prompts, tolerance), None)

    @cached_property
    def chosen(self) -> Trial | None:
        """The chosen trial, or the current best."""
        return self.choice.chosen(self.trials) if self.choice is not None and self.front else None

    @cached_property
    def reason(self) -> str | None:
        """Why the trial was chosen; None while that is open, or for jobs that former versions began."""
        return self.choice.reason(self.trials) if self.choice is not None and self.front else None

    def choice_figures(self, trial: Trial) -> ChoiceFigures | None:
        """Return a finalist's figures on the prompts held out for the choice, None if there are none."""
        return self.choice.figures(trial.number) if self.choice is not None else None

    @cached_property
    def edit(self) -> EditParameters | None:
        """The edit of `chosen`."""
        chosen, resolution, space = self.chosen, self.record.resolution, self.settings["search"]["space"]
        if chosen is None or resolution is None:
            return None
        return self._readable(lambda: trial_edit(self.folder, space, resolution.layers, chosen), None)

    @cached_property
    def result(self) -> RunResult | None:
        """The chosen trial's measured export."""
        if self.prompts is None or self.chosen is None or self.edit is None:
            return None
        export = self.folder.export_folder(self.chosen.number, self.settings["export_format"]).name
        edited = self.figures(export)
        if edited is None:
            return None
        base = self.folder.read_figures("base")
        return RunResult(self.prompts, self.chosen, self.edit, export, base, edited)

    def figures(self, export: str) -> Figures | None:
        """Return an export's figures on the report split."""
        there = self.folder.figures_file(export).exists()
        return self._readable(lambda: self.folder.read_figures(export), None) if there else None

    @property
    def export(self) -> str | None:
        """Name of the result's export folder."""
        return self.result.export if self.result else None

    @property
    def base(self) -> Figures | None:
        """The base model's figures, once there is a result."""
        return self.result.base if self.result else None

    @property
    def edited(self) -> Figures | None:
        """The result's figures."""
        return self.result.edited if self.result else None

    @cached_property
    def warnings(self) -> list[str]:
        """Warnings about the result."""
        result = self.result
        if result is None:
            return []
        asked, words = len(result.prompts.bad_search), self.words
        searched = search_warnings(self.trials, asked, words, self.compared) if self.record.searches else []
        # The first objective by default is what the effect is measured by.
        if REFUSALS not in result.chosen.values.objectives:
            return searched
        return searched + effect_warnings(result.base, result.edited, words)

    @cached_property
    def detectors(self) -> DetectorReport | None:
        """What detectors counted on the result's responses."""
        return self.folder.read_detectors(self.export) if self.export else None

    @cached_property
    def benchmarks(self) -> Benchmarks | None:
        """Benchmark scores of the chosen trial."""
        chosen = self.chosen
        return self._readable(lambda: self.folder.read_benchmarks(chosen.number), None) if chosen else None

    @cached_property
    def answers(self) -> tuple[KeptAnswers, KeptAnswers] | None:
        """Sampled responses of the base model and the edited one."""
        if self.export is None:
            return None
        base, edited = read_answers(self.folder, "base"), read_answers(self.folder, self.export)
        return (base, edited) if base and edited else None

    @cached_property
    def geometry(self) -> GeometryRecord | None:
        """The geometry of all layers."""
        return self._part(self.folder.geometry_file, GeometryRecord)

    @cached_property
    def path(self) -> EditPath | None:
        """The edits found by gradient descent; None where the search had none."""
        return self._part(self.folder.path_file, EditPath)

    @cached_property
    def survey(self) -> dict[str, Any]:
        """The latest preflight.json; {} if it is damaged: the next start writes it anew."""
        try:
            return _SURVEY.validate_json(self.folder.preflight_file.read_bytes())
        except (ValidationError, OSError):
            return {}

    @property
    def checks(self) -> Sequence[dict[str, Any]]:
        """Checks of the latest preflight."""
        found: Sequence[dict[str, Any]] = self.survey.get("checks", ())
        return found

    @property
    def bad_checks(self) -> Sequence[dict[str, Any]]:
        """Checks of the latest preflight that are not ok."""
        return [check for check in self.checks if check["status"] != "ok"]

    @cached_property
    def events(self) -> Sequence[dict[str, Any]]:
        """The event log."""
        return read_events(self.folder.events_file)

    @cached_property
    def phases(self) -> Sequence[PhaseTime]:
        """Time and cost of each phase."""
        return phase_times(self.events)

    @cached_property
    def machines(self) -> tuple[tuple[str, str], ...]:
        """Hardware of the trials; see `machines` in `job.report.results`."""
        return machines(self.events)

    @cached_property
    def held_out(self) -> Mapping[int, Figures]:
        """Figures on the report split by trial number, for the trials of the front that have some."""
        names = {
            trial.number: [self.folder.export_folder(trial.number, form).name for form in FORMATS]
            for trial in self.front
        }
        found = {number: next(filter(None, map(self.figures, exports)), None) for number, exports in names.items()}
        return {number: figures for number, figures in found.items() if figures is not None}

    @cached_property
    def searched_base(self) -> int | None:
        """Prompts of the search split that the base model leaves unanswered, None if unknown."""
        measured = [event for event in self.events if event.get("event") == "baseline"]
        if not measured:
            return None
        unanswered = measured[-1].get("unanswered")
        return int(measured[-1]["refusals"] if unanswered is None else unanswered)

    @property
    def seconds(self) -> float:
        """Time of all starts in seconds, up to the latest event."""
        return time_spent(self.spent.seconds, self.phases)

    @cached_property
    def spent(self) -> Spent:
        """Time and cost over all starts."""
        return read_spent(self.folder.meter_file)

    @cached_property
    def uploads(self) -> Sequence[Upload]:
        """State of each delivery."""
        return self.folder.read_uploads()

    def _part(self, file: Path, kind: type[R]) -> R | None:
        return self._readable(lambda: read_record(file, kind), None) if file.exists() else None

    def _readable(self, read: Callable[[], T], otherwise: T) -> T:
        try:
            return read()
        except (JobError, KeyError, ValueError):  # the latter two for trials of another version
            if not self.lenient:
                raise
            return otherwise
