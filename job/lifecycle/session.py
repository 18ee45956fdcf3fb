"""The model with all that is needed to evaluate and export edits of it, from the run folder's records."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Self

import torch

from job.architectures.discovery import decoder_of
from job.architectures.spec import require_modes
from job.config.schema import Settings
from job.data.prompts import Prompt, PromptSets
from job.directions.extraction import DirectionFinder, tokens_of_forward
from job.directions.response_prefix import with_response_prefix
from job.edits.hooks import Intervention
from job.errors import ImpossibleJobError
from job.export.directions_file import write_edit_file
from job.export.lora import with_adapter, write_adapter
from job.export.merged import Edit, copy_licences, seal_made, verify_written, write_weights
from job.export.reproduction import base_model_name, reproduction
from job.export.verification import MeasuredEdit, is_exact
from job.model.device_faults import Watchdog, clear_faults, is_out_of_memory, out_of_memory
from job.model.loading import LoadedModel, conversations, hardware, load_model
from job.model.memory import release_memory
from job.model.placement import let_go, placement
from job.model.safetensors_files import Checkpoint
from job.numerics.basis import Basis
from job.preflight.checks import size
from job.proof.truth_test import inspect_model
from job.records import (
    DetectorReport,
    EditParameters,
    ExportFormat,
    Figures,
    JobRecord,
    Plan,
    Resolution,
    Trial,
    TrialScores,
)
from job.scoring.broken import Exchange
from job.scoring.detectors import Context, detect
from job.scoring.likelihood import IncoherenceTest
from job.scoring.prompt_batches import PromptBatches
from job.scoring.report_metrics import JudgedResponses, ReportMetrics
from job.scoring.trial_scorer import TrialScorer
from job.search.finalists import in_words, keep_full_counts, next_to_rescore, read_full_counts, with_full_counts
from job.search.optimizer import Search, SearchSpace, SmallerLayoutNeeded, StudySettings
from job.storage.answers import keep_answers
from job.storage.atomic import cannot_write, make_folder, write_record
from job.storage.events import Events
from job.storage.exports import DONE
from job.storage.run_folder import RunFolder
from job.text.refusal_markers import RefusalMarkers
from job.tuning.batch_size import Tuner
from job.workers.crew import Shared, WarmWorkerPool, crew, parts_of

# Where preflight found no plan and was allowed to: halved until they fit.
_ROWS = 32
# Share by which a device may hold more weights than planned before that is worth a warning.
_PLAN_TOLERANCE = 0.1


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
        metrics: Measures the base model on the search split.
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
    metrics: ReportMetrics
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
        architecture = inspect_model(source, settings.loading.trust_remote_code)
        require_modes(architecture, settings.ablation.row_normalization, settings.export_format)
        Checkpoint(source).require_writers(architecture)
        events.emit(
            "architecture",
            f"architecture: {architecture.model_type}, {architecture.layer_count} layers, "
            f"{len(architecture.writers)} residual writers, proven complete",
        )
        loaded = _load(source, record, settings, events)
        require_resident(loaded, settings.export_format)
        conversations(loaded.tokenizer, prompts.everything)  # at once: one process renders them all
        watchdog = Watchdog(settings.hang_seconds, folder.stacks_file)
        with clear_faults(), watchdog.watching(decoder_of(loaded.model)):
            record, resolution = _resolve(folder, record, settings, prompts, loaded, architecture.norms, events)
            loaded = replace(loaded, response_prefix=resolution.response_prefix)
            if not settings.ablation.through_norms:
                loaded = replace(loaded, architecture=loaded.architecture.without_norms())
            basis = _finder(folder, record, settings, loaded, resolution, prompts, events).find(prompts)
            metrics = metrics_of(loaded, settings, prompts.good_search, prompts.bad_search, resolution.rows, events)
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
                    metrics,
                    intervention,
                )

    @cached_property
    def scorer(self) -> TrialScorer:
        """Scores edits on the search split; what they are compared with is measured on first use."""
        return scorer_of(self.metrics)

    @cached_property
    def incoherence(self) -> IncoherenceTest:
        """Tells incoherent responses; calibrated by `measure_baseline`, else on first use."""
        return self.metrics.incoherence_test()

    def measure_baseline(self) -> None:
        """Measure the base model on the search split.

        Raises:
            ImpossibleJobError: It refuses nothing, so that there is nothing to remove.
        """
        responses = self.metrics.responses()
        self.incoherence = self.metrics.incoherence_test(responses)
        judged = self.metrics.judge(responses, self.incoherence.flags(responses))
        figures = judged.figures(self.metrics.kl_tokens)
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

    def search(self, live: Path, copy: Path | None) -> Search:
        """Return the study on disk.

        Args:
            live: The study.
            copy: Where it is copied to after every batch; None: beside it.
        """
        return Search(
            live,
            self.space,
            StudySettings(
                seed=self.settings.seed,
                startup_trials=self.record.startup_trials,
                batch=self.settings.trials_per_batch,
                rows=self.resolution.search_rows or self.resolution.rows,
                ei_candidates=self.settings.search.ei_candidates,
                known_points=self.settings.search.known_points,
                together=self.resolution.together,
                ahead=self.settings.search.ahead,
            ),
            copy,
            (self.settings.database, self.record.job_id) if self.settings.database else None,
        )

    def scores(self, edits: Sequence[EditParameters], rows: int, whole: bool) -> Sequence[TrialScores]:
        """Score edits in one batch.

        Args:
            edits: The edits.
            rows: Rows of a forward.
            whole: On answers of full length, none left out; else as the search does.
        """
        begun, limit = self.settings.scoring.effective_search_tokens, self.settings.skip_kl_above
        if whole:
            return self.scorer.full_scores(
                self.intervention, edits, rows, search_tokens=begun, incoherence=self.incoherence
            )
        return self.scorer.scores(self.intervention, edits, rows, skip_kl_above=limit, response_tokens=begun)

    @contextmanager
    def crew(self, hands: WarmWorkerPool) -> Iterator[Shared]:
        """Yield what scores plans together with other processes.

        Args:
            hands: Processes that may become workers.

        Raises:
            HeldError: Another run is the job's coordinator.
            MachineError: The job's database cannot be reached.
        """
        workers = workers_here(self.settings, self.loaded)
        devices = cuda_devices() if self.loaded.device.type == "cuda" else []
        with (
            share_of_cores(self.loaded, workers),
            crew(self.folder, workers, devices, self.settings.database, self.events, hands) as shared,
        ):
            yield shared

    def rescore(self, trials: Sequence[Trial], shared: Shared) -> list[Trial]:
        """Count again at full length until the choice is final; return all trials with these counts.

        What has been counted is kept after every batch, and a restart goes on from there.

        Args:
            trials: The finished trials as the search has measured them.
            shared: Has the parts of a batch scored.
        """
        counts, asked = read_full_counts(self.folder), len(self.prompts.bad_search)
        tolerance, size = self.settings.choice.refusal_tolerance, self.settings.trials_per_batch
        parts = -(-size // (self.resolution.together or size))
        while batch := next_to_rescore(trials, counts, asked, tolerance, size):
            plan = Plan(
                first=batch[0].number,
                parameters=[trial.params for trial in batch],
                rows=self.resolution.search_rows or self.resolution.rows,
                together=-(-len(batch) // parts),  # also a small batch is for all who are there
                whole=True,
            )
            try:
                scores = self.evaluate([plan], shared)
            except SmallerLayoutNeeded:
                continue  # it has been written down, and is what comes next
            found = {trial.number: score for trial, score in zip(batch, scores, strict=True)}
            counts = keep_full_counts(self.folder, counts, found)
            for trial in batch:
                before, after = trial.values, found[trial.number]
                self.events.emit(
                    "rescored",
                    f"trial {trial.number} at full length: {in_words(after, asked)}; in the search {in_words(before)}",
                    number=trial.number,
                    refusals=after.refusals,
                    broken=after.broken,
                )
        return with_full_counts(trials, counts)

    def evaluate(self, plans: Sequence[Plan], shared: Shared) -> Sequence[TrialScores]:
        """Score all trials of the first plan.

        Args:
            plans: The plan, and those that may be begun before it is done.
            shared: Has their parts scored.

        Raises:
            MachineError: Memory does not suffice for one prompt at a time.
            SmallerLayoutNeeded: It does not suffice for the plan's rows.
        """
        rounds = [(plan, parts_of(plan, [self.space.edit(params) for params in plan.parameters])) for plan in plans]
        try:
            return shared(rounds, self.scores)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            rows = plans[0].rows // 2
            if rows < max(len(part) for _, parts in rounds for part in parts):
                raise out_of_memory(error) from error
        release_memory()
        self.events.emit(
            "out_of_memory", f"warning: out of memory: the search goes on with {rows} rows a forward", rows=rows
        )
        self.resolution = self.resolution.model_copy(update={"search_rows": rows})
        self.record = self.record.model_copy(update={"resolution": self.resolution})
        write_record(self.folder.job_file, self.record)
        raise SmallerLayoutNeeded(rows)

    def export(self, trial: Trial, trials: int, form: ExportFormat) -> None:
        """Write a trial's edit, prove what was written, measure it and seal it.

        What was written is loaded afresh in the place of the base model, which nothing can be measured on afterwards.

        Args:
            trial: The trial.
            trials: Trials that the search has made.
            form: What is written.

        Raises:
            ExportMismatchError: What was written is not what was measured.
        """
        require_resident(self.loaded, form)
        export = self.folder.export_folder(trial.number, form)
        edit = Edit(self.space.edit(trial.params), self.basis, self.settings.ablation.row_normalization)
        self.events.emit("export_started", f"exporting trial {trial.number} to {export}", trial=trial.number)
        try:
            make_folder(export)
            (export / DONE).unlink(missing_ok=True)
        except OSError as error:
            raise cannot_write(export, error) from error
        self._write(export, edit, form)
        figures = self._figures(export, edit.parameters, form)
        made = reproduction(
            self.record,
            self.settings,
            self.prompts,
            trial=trial,
            trials=trials,
            edit=edit.parameters,
            figures=figures,
            form=form,
        )
        if form == "directions":
            write_edit_file(export, self.loaded.folder, self.loaded.architecture, edit, made)
        if form != "merged":
            copy_licences(self.loaded.folder, export)
        seal_made(export, made, self.loaded.folder)
        self.events.emit("exported", export=export.name)

    def _write(self, export: Path, edit: Edit, form: ExportFormat) -> None:
        """Write the weights of an export, where it has any."""
        source, architecture = self.loaded.folder, self.loaded.architecture
        if form == "merged":
            with self.events.progress("shards", len(Checkpoint(source).files)) as advance:
                own_code = self.settings.loading.trust_remote_code
                write_weights(source, export, architecture, edit, advance, own_code=own_code)
            verify_written(source, export, architecture, edit)
        elif form == "adapter":
            write_adapter(self.loaded, export, edit, base_model_name(self.record, self.settings))

    def _figures(self, export: Path, parameters: EditParameters, form: ExportFormat) -> tuple[Figures, Figures]:
        """Measure the base model and the edited one on the report split, alike, the latter as anyone would load it.

        There is never more than one of them in memory: two need not fit.

        Raises:
            ExportMismatchError: The export, loaded afresh, is not what was measured.
        """
        base = self._metrics(self.loaded, self.prompts.good_report, self.prompts.bad_report)
        plain = base.responses()
        edits = self.intervention.activate([parameters])
        responses = base.responses(edits)
        # The base model judges coherence while it is loaded; the export is proven to respond alike.
        incoherence = base.incoherence_test(plain)
        incoherent = incoherence.flags(responses)
        before = base.judge(plain, incoherence.flags(plain))
        self._keep(before, "base")
        reference = base.reference()
        if form == "directions":  # an edit without weights: measured under its hooks
            after = base.judge(responses, incoherent)
            divergences = reference.divergences(base.batches, edits)
        else:
            measured = self._measured_edit(parameters, form)
            fresh = self._reloaded(export, form)
            found = measured.compare(self._metrics(fresh, self.prompts.good_search, self.prompts.bad_search))
            self.events.emit("export_proven", f"the export was loaded afresh: {found}")
            reported = self._metrics(fresh, self.prompts.good_report, self.prompts.bad_report)
            after = reported.judge(reported.responses(), incoherent)
            divergences = reference.divergences(reported.batches)
        self._keep(after, export.name)
        figures = before.figures(base.kl_tokens), after.figures(base.kl_tokens, divergences)
        for subject, one in zip(("base", export.name), figures, strict=True):
            file = self.folder.figures_file(subject)
            make_folder(file.parent)
            write_record(file, one)
        write_record(self.folder.detectors_file(export.name), self._detected(before.exchanges, after.exchanges))
        return figures

    def _measured_edit(self, parameters: EditParameters, form: ExportFormat) -> MeasuredEdit:
        """Measure what the reloaded export must agree with, on the search split."""
        held = form == "adapter" or Checkpoint(self.loaded.folder).keeps(self.loaded.architecture, torch.float32)
        if held and is_exact(self.loaded):
            return MeasuredEdit.by_responses(self.metrics, self.intervention, parameters)
        return MeasuredEdit.by_scores(self.scorer, self.intervention, parameters, self.resolution.rows)

    def _detected(self, before: Sequence[Exchange], after: Sequence[Exchange]) -> DetectorReport:
        """Return what the detectors say of the base model's answers and of the edited one's."""
        scoring = self.settings.scoring
        context = Context(scoring, self.settings.loading, self.events.say)
        return detect(scoring.detectors, context, before, after, len(self.prompts.good_report))

    def _reloaded(self, export: Path, form: ExportFormat) -> LoadedModel:
        """Return an export loaded in the base model's place."""
        let_go(self.loaded.model)
        release_memory()
        folder = self.loaded.folder if form == "adapter" else export
        fresh = load_model(folder, self.settings.loading, self.events.say, dtype=self.resolution.dtype)
        if form == "adapter":
            fresh = with_adapter(fresh, export)
        return replace(fresh, response_prefix=self.resolution.response_prefix)

    def _metrics(self, loaded: LoadedModel, good: Sequence[Prompt], bad: Sequence[Prompt]) -> ReportMetrics:
        return metrics_of(loaded, self.settings, good, bad, self.resolution.rows, self.events)

    def _keep(self, judged: JudgedResponses, subject: str) -> None:
        keep_answers(self.folder, subject, judged.kept, self.prompts)


def require_resident(loaded: LoadedModel, form: ExportFormat) -> None:
    """Refuse to make an adapter for a model of which weights are offloaded: PEFT cannot put it on such a one.

    Raises:
        ImpossibleJobError: It is to be one.
    """
    if form == "adapter" and any(parameter.is_meta for parameter in loaded.model.parameters()):
        raise ImpossibleJobError(
            "an adapter cannot be proven on a model of which weights are offloaded",
            remedy="use export_format = merged, or loading.device_map = single or balanced",
        )


def _load(source: Path, record: JobRecord, settings: Settings, events: Events) -> LoadedModel:
    pinned = record.resolution.dtype if record.resolution else None
    events.emit("loading", "loading the model")
    loaded = load_model(source, settings.loading, events.say, dtype=pinned)
    held, planned = placement(loaded.model), record.planned_weights or {}
    told = ", ".join(f"{size(count)} on {place}" for place, count in held.items())
    events.emit("loaded", f"loaded in {loaded.dtype}: {told}", hardware=hardware(loaded.device), placement=held)
    for place, count in held.items():
        if place in planned and count > planned[place] * (1 + _PLAN_TOLERANCE):
            events.say(f"warning: the plan was {size(planned[place])} of weights on {place}")
    return loaded


def _finder(
    folder: RunFolder,
    record: JobRecord,
    settings: Settings,
    loaded: LoadedModel,
    resolution: Resolution,
    prompts: PromptSets,
    events: Events,
) -> DirectionFinder:
    tokens = tokens_of_forward(loaded, _measured(prompts), resolution.rows, settings.scoring.answer_tokens)
    return DirectionFinder(folder, record, settings.directions, loaded, resolution.rows, tokens, events)


def _resolve(
    folder: RunFolder,
    record: JobRecord,
    settings: Settings,
    prompts: PromptSets,
    loaded: LoadedModel,
    norms: tuple[str, ...],
    events: Events,
) -> tuple[JobRecord, Resolution]:
    """Return the record with its resolution, which the job's first start makes and writes down."""
    if record.resolution is not None:
        return record, record.resolution
    rows = settings.batching.rows or record.planned_rows or _ROWS
    prefix = settings.loading.response_prefix
    if prefix == "auto":
        prefix = with_response_prefix(loaded, prompts.good, prompts.bad, rows).response_prefix
    if prefix:
        events.emit("response_prefix", f"answers are made to begin with {prefix!r}")
    loaded = replace(loaded, response_prefix=prefix)
    workers = workers_here(settings, loaded)
    together = settings.batching.trials or -(-settings.trials_per_batch // workers)
    if settings.tune:
        scorer = partial(_scorer, loaded, settings, events)
        place, size = folder.path.parent, min(together, settings.trials_per_batch)
        rows = Tuner(place, record, settings, prompts, loaded, scorer, size, workers, events).rows(rows)
    resolution = Resolution(
        dtype=loaded.dtype,
        rows=rows,
        layers=loaded.architecture.layer_count,
        response_prefix=prefix,
        together=together,
        norms=norms,
    )
    record = record.model_copy(update={"resolution": resolution})
    write_record(folder.job_file, record)
    return record, resolution


def workers_here(settings: Settings, loaded: LoadedModel) -> int:
    """Return how many processes evaluate trials on this machine: one for every GPU if this one holds the model."""
    if settings.workers is not None:
        return settings.workers
    whole = settings.loading.device == "auto" and settings.loading.device_map == "single"
    return max(1, len(cuda_devices())) if whole and loaded.device.type == "cuda" else 1


@contextmanager
def share_of_cores(loaded: LoadedModel, processes: int) -> Iterator[None]:
    """Within the block compute with as many threads as leave the other processes of this machine theirs."""
    threads = torch.get_num_threads()
    if loaded.device.type == "cpu":
        torch.set_num_threads(max(1, threads // processes))
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def cuda_devices() -> list[str]:
    """Return what CUDA calls the devices that this process may use, its own first."""
    count = torch.cuda.device_count()
    named = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return named.split(",")[:count] if named else [str(number) for number in range(count)]


def metrics_of(
    loaded: LoadedModel, settings: Settings, good: Sequence[Prompt], bad: Sequence[Prompt], rows: int, events: Events
) -> ReportMetrics:
    """Return metrics of a model on good and bad prompts, as the settings say.

    Args:
        loaded: The model.
        settings: How responses are judged.
        good: Prompts that KL is measured on.
        bad: Prompts whose refusals are counted.
        rows: Rows per forward.
        events: Receives a warning when memory does not suffice for so many.
    """
    return ReportMetrics(
        PromptBatches.of(loaded, good, bad, rows, report=events.say),
        RefusalMarkers(settings.scoring.refusal_markers),
        settings.scoring.answer_tokens,
        settings.kl_tokens,
        settings.scoring.gibberish,
    )


def _scorer(
    loaded: LoadedModel, settings: Settings, events: Events, good: Sequence[Prompt], bad: Sequence[Prompt], rows: int
) -> TrialScorer:
    return scorer_of(metrics_of(loaded, settings, good, bad, rows, events))


def scorer_of(metrics: ReportMetrics) -> TrialScorer:
    """Return a scorer of edits that judges responses as the base model's metrics do."""
    return TrialScorer.measured(metrics.batches, metrics.markers, metrics.response_tokens, metrics.kl_tokens)


def _measured(prompts: PromptSets) -> list[Prompt]:
    """Return the prompts whose length decides how many rows a forward takes."""
    return [*prompts.good, *prompts.bad, *prompts.good_search, *prompts.bad_search]
