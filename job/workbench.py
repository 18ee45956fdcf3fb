"""The model with all that is needed to evaluate and export edits of it, from the run folder's records."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

from job.directions import DirectionFinder, tokens_of_forward
from job.errors import ImpossibleJobError
from job.evaluation import Evaluator
from job.events import Events
from job.export import Checkpoint, Edit, seal, verify_written, write_weights
from job.intervention import Intervention
from job.model import LoadedModel, load_model, rows_that_fit
from job.numerics.basis import Basis
from job.prefix import with_response_prefix
from job.prompts import Prompt, PromptSets
from job.records import Figures, JobRecord, Plan, Resolution, Trial, TrialScores
from job.report import model_card
from job.scoring import RefusalMarkers
from job.search import Search, SearchSettings, SearchSpace
from job.settings import Settings
from job.truth import inspect_model
from job.verification import prove_export
from job.workspace import RunFolder, write_record


@dataclass
class Workbench:
    """One loaded model, its directions and its prompts.

    Attributes:
        folder: The run folder.
        record: Its job.json, with everything resolved.
        settings: The settings.
        prompts: All prompt sets.
        events: Where progress goes.
        loaded: The base model.
        resolution: What the job's first start resolved.
        basis: The directions of all layers.
        evaluator: Measures on the search split.
        intervention: The hooks on the base model, in place.
    """

    folder: RunFolder
    record: JobRecord
    settings: Settings
    prompts: PromptSets
    events: Events
    loaded: LoadedModel
    resolution: Resolution
    basis: Basis
    evaluator: Evaluator
    intervention: Intervention

    @classmethod
    @contextmanager
    def prepared(
        cls,
        folder: RunFolder,
        record: JobRecord,
        settings: Settings,
        source: Path,
        prompts: PromptSets,
        events: Events,
    ) -> Iterator[Self]:
        """Load the model from its folder, resolve what is open, find the directions and put the hooks in place."""
        architecture = inspect_model(source)
        Checkpoint(source).require_writers(architecture)
        events.emit(
            "architecture",
            f"architecture: {architecture.model_type}, {architecture.layer_count} layers, "
            f"{len(architecture.writers)} residual writers, proven complete",
        )
        loaded = _load(source, record, settings, events)
        record, resolution = _resolve(folder, record, settings, prompts, loaded, events)
        loaded = replace(loaded, response_prefix=resolution.response_prefix)
        finder = DirectionFinder(
            folder,
            record,
            settings.directions,
            loaded,
            resolution.rows,
            tokens_of_forward(loaded, _measured(prompts), resolution.rows, settings.scoring.answer_tokens),
            events,
        )
        basis = finder.find(prompts)
        evaluator = _evaluator(loaded, settings, prompts.good_search, prompts.bad_search, resolution.rows)
        mode = settings.ablation.row_normalization
        with Intervention(loaded.model, loaded.architecture, basis, mode) as intervention:
            yield cls(
                folder,
                record,
                settings,
                prompts,
                events,
                loaded,
                resolution,
                basis,
                evaluator,
                intervention,
            )

    def measure_baseline(self) -> None:
        """Measure the base model on the search split.

        Raises:
            ImpossibleJobError: It refuses nothing, so that there is nothing to remove.
        """
        figures = self.evaluator.figures()
        self.events.emit(
            "baseline",
            f"base model: {figures.refusals} of {figures.bad_prompts} bad prompts refused, "
            f"{figures.false_refusals} of {figures.good_prompts} good ones",
            **figures.model_dump(),
        )
        if figures.refusals == 0:
            raise ImpossibleJobError(
                "the base model refuses none of the bad evaluation prompts: there is nothing to remove",
                remedy="check the prompts and scoring.refusal_markers",
            )

    @property
    def space(self) -> SearchSpace:
        """The space of edits."""
        return SearchSpace(self.settings.search.space, self.resolution.layers, self.basis.size)

    def search(self) -> Search:
        """Return the study on disk."""
        return Search(
            self.folder.study_file,
            self.space,
            SearchSettings(
                seed=self.settings.seed,
                startup_trials=self.record.startup_trials,
                batch=self.settings.trials_per_batch,
                rows=self.resolution.rows,
                ei_candidates=self.settings.search.ei_candidates,
            ),
        )

    def evaluate(self, plan: Plan) -> Sequence[TrialScores]:
        """Score all trials of a plan in one batch."""
        edits = [self.space.edit(params) for params in plan.parameters]
        return self.evaluator.scores(self.intervention, edits, plan.rows)

    def export(self, trial: Trial) -> None:
        """Write a trial's model, prove it by loading it afresh, measure it and seal it.

        Raises:
            ExportMismatchError: What was written is not what was measured.
        """
        export = self.folder.export_folder(trial.number)
        parameters = self.space.edit(trial.params)
        edit = Edit(parameters, self.basis, self.settings.ablation.row_normalization)
        source, architecture = self.loaded.folder, self.loaded.architecture
        self.events.emit("export_started", f"exporting trial {trial.number} to {export}", trial=trial.number)
        with self.events.progress("shards", len(Checkpoint(source).files)) as advance:
            write_weights(source, export, architecture, edit, advance)
        verify_written(source, export, architecture, edit)
        # A fresh object, as anyone else would load it, in the dtype that the job has settled on.
        fresh = load_model(export, self.settings.loading, self.events.say, dtype=self.resolution.dtype)
        fresh = replace(fresh, response_prefix=self.resolution.response_prefix)
        rows = self.resolution.rows
        found = prove_export(
            self.evaluator,
            _evaluator(fresh, self.settings, self.prompts.good_search, self.prompts.bad_search, rows),
            self.intervention,
            parameters,
            rows,
        )
        self.events.emit("export_proven", f"the export was loaded afresh: {found}")
        base, edited = self._figures(fresh, export.name)
        seal(export, model_card(self.record, trial, parameters, base, edited))

    def _figures(self, edited: LoadedModel, name: str) -> tuple[Figures, Figures]:
        """Measure the base model and an edited one on the report split, alike."""
        pair = (self.prompts.good_report, self.prompts.bad_report)
        base = _evaluator(self.loaded, self.settings, *pair, self.resolution.rows)
        other = _evaluator(edited, self.settings, *pair, self.resolution.rows)
        found = (base.figures(), other.figures(base))
        for subject, figures in zip(("base", name), found, strict=True):
            file = self.folder.figures_file(subject)
            file.parent.mkdir(exist_ok=True)
            write_record(file, figures)
        return found


def _load(source: Path, record: JobRecord, settings: Settings, events: Events) -> LoadedModel:
    pinned = record.resolution.dtype if record.resolution else None
    events.emit("loading", "loading the model")
    loaded = load_model(source, settings.loading, events.say, dtype=pinned)
    events.emit("loaded", f"loaded in {loaded.dtype} on {loaded.device}")
    return loaded


def _resolve(
    folder: RunFolder,
    record: JobRecord,
    settings: Settings,
    prompts: PromptSets,
    loaded: LoadedModel,
    events: Events,
) -> tuple[JobRecord, Resolution]:
    """Return the record with its resolution, which the job's first start makes and writes down."""
    if record.resolution is not None:
        return record, record.resolution
    longest = max(map(len, loaded.tokenize(_measured(prompts))))
    rows = settings.batching.rows or rows_that_fit(loaded, longest + settings.scoring.answer_tokens)
    prefix = settings.loading.response_prefix
    if prefix == "auto":
        prefix = with_response_prefix(loaded, prompts.good, prompts.bad, rows).response_prefix
    if prefix:
        events.emit("response_prefix", f"answers are made to begin with {prefix!r}")
    resolution = Resolution(
        dtype=loaded.dtype, rows=rows, layers=loaded.architecture.layer_count, response_prefix=prefix
    )
    record = record.model_copy(update={"resolution": resolution})
    write_record(folder.job_file, record)
    return record, resolution


def _evaluator(
    loaded: LoadedModel, settings: Settings, good: Sequence[Prompt], bad: Sequence[Prompt], rows: int
) -> Evaluator:
    return Evaluator(
        loaded,
        good,
        bad,
        markers=RefusalMarkers(settings.scoring.refusal_markers),
        answer_tokens=settings.scoring.answer_tokens,
        rows=rows,
    )


def _measured(prompts: PromptSets) -> list[Prompt]:
    """Return the prompts whose length decides how many rows a forward takes."""
    return [*prompts.good, *prompts.bad, *prompts.good_search, *prompts.bad_search]
