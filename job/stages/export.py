"""The export of a trial: written, reloaded, verified, measured on the report split, and sealed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import torch

from job.config.scorers import judging
from job.data.prompts import Prompt
from job.directions.learned import export_learned
from job.edits.hooks import ActiveEdits
from job.export.directions_file import write_edit_file
from job.export.lora import with_adapter, write_adapter
from job.export.merged import Edit, copy_licences, seal_made, write_weights
from job.export.reproduction import Reproduction, base_model_name, reproduction
from job.export.verification import MeasuredEdit, is_exact
from job.lifecycle.repair import is_exported_whole
from job.lifecycle.running import OpenJob, RunningJob
from job.model.loading import LoadedModel, load_model
from job.model.memory import release_memory
from job.model.placement import let_go
from job.model.safetensors_files import Checkpoint
from job.records import DetectorReport, EditParameters, ExportFormat, Figures, Outcomes, Trial
from job.scoring.detectors import detect
from job.scoring.report_metrics import JudgedResponses, ReportMetrics
from job.search.method import search_method
from job.stages.choice import choice_figures, is_current
from job.stages.measuring import metrics_of, shown_generating
from job.stages.model import as_resolved, rendering_of, require_resident
from job.stages.objectives import scorer_context
from job.stages.session import ModelSession
from job.storage.answers import keep_answers
from job.storage.atomic import cannot_write, ensure_folder, make_folder, read_record, write_record
from job.storage.exports import DONE, REPRODUCE


def write_export(session: ModelSession, trial: Trial, trials: int, form: ExportFormat) -> Path:
    """Write, verify, measure and seal a trial's edit in a format; return its folder.

    The export replaces the base model in memory, which is unusable afterwards. Raises ExportMismatchError or
    MachineError.
    """
    job, model = session.job, session.model
    require_resident(model, form)
    export = job.folder.export_folder(trial.number, form)
    parameters = session.edit(trial)
    edit = Edit(parameters, session.basis_of(parameters), job.settings.ablation.row_normalization)
    job.events.emit("export_started", f"exporting trial {trial.number} to {export}", trial=trial.number)
    try:
        make_folder(export)
        (export / DONE).unlink(missing_ok=True)
    except OSError as error:
        raise cannot_write(Path(error.filename or export), error) from error
    proven = _write_weights(session, export, edit, form)
    export_learned(job.folder, parameters, export)
    made = reproduction(
        job.record,
        job.settings,
        session.prompts,
        trial=trial,
        trials=trials,
        edit=edit.parameters,
        figures=_Measurement(session, export, form).figures(edit.parameters),
        form=form,
        choice=choice_figures(job, trial, session.prompts),
        method=search_method(job.folder, job.settings.search.asked_method),
    )
    if form == "directions":
        write_edit_file(export, model.folder, model.architecture, edit, made)
    if form != "merged":
        copy_licences(model.folder, export)
    try:
        with job.events.progress("hashing the export", 1):
            _seal(session, export, made, proven)
    except OSError as error:
        raise cannot_write(Path(error.filename or export), error) from error
    job.events.emit("exported", export=export.name)
    return export


def complete_export(job: RunningJob, session: ModelSession, trial: Trial, trials: int) -> None:
    """Write the job's export, or bring it up to date."""
    export = job.export_of(trial)
    if not is_exported_whole(job.folder, export) or not is_current(job, export, trial, trials, session.prompts):
        job.begin("export")
        update_export(session, trial, trials, job.settings.export_format)


def update_export(session: ModelSession, trial: Trial, trials: int, form: ExportFormat) -> None:
    """Write a trial's export; one finished before the search was extended states the search as it is now."""
    job = session.job
    export = job.folder.export_folder(trial.number, form)
    # The file of directions holds the search's statements as well.
    if form == "directions" or not is_exported_whole(job.folder, export):
        write_export(session, trial, trials, form)
        return
    now = {"trials": trials, "trial": trial, "choice": choice_figures(job, trial, session.prompts)}
    made = read_record(export / REPRODUCE, Reproduction).model_copy(update=now)
    (export / DONE).unlink()  # if interrupted from here on, the export is written again
    _seal(session, export, made, made.weights)


def _seal(session: ModelSession, export: Path, made: Reproduction, known: Mapping[str, str]) -> None:
    """Complete an export with what was measured of it; `known` as in `seal_made`."""
    folder = session.job.folder
    benchmarks, detectors = folder.read_benchmarks(made.trial.number), folder.read_detectors(export.name)
    seal_made(export, made, session.model.folder, benchmarks, known, detectors)


def _write_weights(session: ModelSession, export: Path, edit: Edit, form: ExportFormat) -> Mapping[str, str]:
    """Write and verify the weights; return the SHA-256 of the verified files, by name."""
    job, model = session.job, session.model
    if form == "merged":
        shards = len(Checkpoint(model.folder).files)
        with job.events.progress("shards", shards) as advance:
            own_code = job.settings.loading.trust_remote_code
            written = write_weights(model.folder, export, model.architecture, edit, advance, own_code=own_code)
        with job.events.progress("reading the export back", shards) as advance:
            written.verify(advance)
        return written.hashes
    if form == "adapter":
        write_adapter(model, export, edit, base_model_name(job.record, job.settings))
    return {}


@dataclass(frozen=True)
class _Measurement:
    """Measures the base model and an export on the report split by the same procedure.

    The export is loaded from disk as a user would. Only one model is in memory at a time: two may not fit.
    """

    session: ModelSession
    export: Path
    form: ExportFormat

    @property
    def _job(self) -> OpenJob:
        return self.session.job

    def figures(self, parameters: EditParameters) -> tuple[Figures, Figures]:
        """Measure both, and store samples and detector results. Raises ExportMismatchError."""
        session, prompts = self.session, self.session.prompts
        base = self._metrics(session.model, prompts.good_report, prompts.bad_report)
        with self._shown("the base model's responses and the edit's", 2 * base.most_tokens):
            plain = base.responses()
            edits = session.hooks.activate([parameters])
            responses = base.responses(edits)
        # The base model judges coherence while it is loaded; the export is proven to respond alike.
        incoherence = base.incoherence_test(plain)
        incoherent = incoherence.flags(responses)
        before = base.judge(plain, incoherence.flags(plain))
        self._keep_answers(before, "base")
        reference = base.reference()
        more = base.more_reference(reference, plain)
        thought = base.thinking()
        over_refusal = self._over_refusal(session.model)
        if self.form == "directions":  # an edit without weights: measured under its hooks
            after = base.judge(responses, incoherent)
            divergences, others = (one.divergences(base.batches, edits) for one in (reference, more))
            rethought = base.thinking(edits)
            still_refused = self._over_refusal(session.model, edits)
        else:
            reported = self._metrics(self._proven(parameters), prompts.good_report, prompts.bad_report)
            with self._shown("the export's responses", reported.most_tokens):
                after = reported.judge(reported.responses(), incoherent)
            divergences, others = (one.divergences(reported.batches) for one in (reference, more))
            rethought = reported.thinking()
            still_refused = self._over_refusal(reported.batches.loaded)
        self._keep_answers(after, self.export.name)
        changed = after.figures(base.kl_tokens, divergences, (more.tokens, others), rethought)
        original = before.figures(base.kl_tokens, thinking=thought)
        figures = _with_outcomes(original, over_refusal), _with_outcomes(changed, still_refused)
        for subject, one in zip(("base", self.export.name), figures, strict=True):
            file = self._job.folder.figures_file(subject)
            ensure_folder(file.parent)
            write_record(file, one)
        write_record(self._job.folder.detectors_file(self.export.name), self._detected(before, after))
        return figures

    def _over_refusal(self, model: LoadedModel, edits: ActiveEdits | None = None) -> tuple[Outcomes, ...]:
        """Count a model's responses to harmless requests with alarming words; none unless such are given."""
        prompts = self.session.prompts.over_refusal
        if not prompts:
            return ()
        metrics = self._metrics(model, prompts, ())
        with self._shown("responses to harmless requests", metrics.most_tokens):
            return metrics.good_outcomes("over-refusal", edits)

    def _proven(self, parameters: EditParameters) -> LoadedModel:
        """Reload the export in the base model's place, compared with the edit on the search split."""
        prompts = self.session.prompts
        with self._shown("verifying the export", 2 * self.session.scorer.metrics.most_tokens):
            measured = self._measured_edit(parameters)
            fresh = self._reloaded()
            found = measured.compare(self._metrics(fresh, prompts.good_search, prompts.bad_search))
        self._job.events.emit("export_proven", f"export verified: {found}")
        return fresh

    def _measured_edit(self, parameters: EditParameters) -> MeasuredEdit:
        """Measure on the search split what the reloaded export must agree with."""
        session, model = self.session, self.session.model
        keeps_precision = self.form == "adapter" or Checkpoint(model.folder).keeps(model.architecture, torch.float32)
        if keeps_precision and is_exact(model):
            return MeasuredEdit.by_responses(session.scorer.metrics, session.hooks, parameters)
        return MeasuredEdit.by_scores(session.scorer.trials, session.hooks, parameters)

    def _reloaded(self) -> LoadedModel:
        base, job = self.session.model, self._job
        let_go(base.model)
        release_memory()
        folder = base.folder if self.form == "adapter" else self.export
        loading, rendering = job.settings.loading, rendering_of(job.record)
        fresh = load_model(folder, loading, job.events.say, dtype=job.resolution.dtype, rendering=rendering)
        if self.form == "adapter":
            fresh = with_adapter(fresh, self.export)
        return as_resolved(fresh, job.record)

    def _detected(self, before: JudgedResponses, after: JudgedResponses) -> DetectorReport:
        settings = self._job.settings
        searched = [one.scorer for one in judging(settings.search.objectives)] if self._job.record.searches else []
        names, prompts = [*settings.scoring.detectors, *searched], len(self.session.prompts.good_report)
        return detect(names, scorer_context(self._job), before.exchanges, after.exchanges, prompts)

    def _metrics(self, model: LoadedModel, good: Sequence[Prompt], bad: Sequence[Prompt]) -> ReportMetrics:
        job = self._job
        return metrics_of(model, job.settings, job.markers, good, bad, job.resolution.rows, job.events)

    def _shown(self, label: str, most_tokens: int) -> AbstractContextManager[None]:
        return shown_generating(self._job.events, label, most_tokens)

    def _keep_answers(self, judged: JudgedResponses, subject: str) -> None:
        keep_answers(self._job.folder, subject, judged.kept, self.session.prompts)


def _with_outcomes(figures: Figures, more: tuple[Outcomes, ...]) -> Figures:
    return figures.model_copy(update={"outcomes": (*figures.outcomes, *more)}) if more else figures
