"""`abliterate evaluate`: an edited model against its base model, by the same measurements."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from job.config.schema import Settings
from job.config.sections import PromptSettings
from job.data.prompts import Prompt, read_prompts, report_prompts
from job.directions.response_prefix import with_response_prefix
from job.errors import JobError, UsageError
from job.evaluate.attach import attach_benchmarks
from job.evaluate.measure import Asked, KLReferences, MeasuredModel, ModelBench, Pair, Texts, bench_of, opened
from job.evaluate.result import Comparison, Divergence, TextComparison, shares_of
from job.evaluate.subject import Subject, fetch_subject, locate
from job.lifecycle.running import OpenJob
from job.model.bnb import LoadIn
from job.model.device_faults import clear_faults
from job.model.memory import release_memory
from job.records import DetectorReport
from job.report.results import job_trials
from job.scoring.detectors import Context, detect
from job.scoring.lm_eval import Harness, paired_scores
from job.scoring.perplexity import DEFAULT_TEXT, plain_texts
from job.stages.followups import looking, trial_of
from job.stages.objectives import scorer_context
from job.storage.atomic import write_record
from job.storage.events import Events
from job.storage.job_file import JobFile
from job.storage.jobs import job_settings
from job.storage.run_folder import RunFolder

NO_TEXT = "none"
_OWN_ANSWERS = "the base model's own responses to the good prompts"


@dataclass(frozen=True)
class ComparisonRequest:
    """A requested comparison; `text` is a SPEC, NO_TEXT, or None: web text, else the base model's responses."""

    good: str | None = None
    bad: str | None = None
    text: str | None = None
    tasks: tuple[str, ...] = ()
    limit: int | None = None
    tasks_folder: Path | None = None
    load_in: LoadIn | None = None

    def harness(self) -> Harness | None:
        """Return the benchmarks' harness, None without any. Raises MachineError or UsageError."""
        return Harness(self.tasks, self.limit, self.tasks_folder) if self.tasks else None

    def prompts(self, settings: Settings, report: Callable[[str], None], default: Pair | None = None) -> Pair:
        """Return the requested good and bad prompts, else the default's or the settings' report prompts."""

        def found(kind: str, spec: str | None, own: tuple[Prompt, ...] | None) -> tuple[Prompt, ...]:
            if spec is not None:
                return read_prompts(PromptSettings(spec=spec), report)
            return own if own is not None else report_prompts(settings, kind, report)

        good, bad = default or (None, None)
        return found("good", self.good, good), found("bad", self.bad, bad)

    def texts(self, report: Callable[[str], None]) -> Texts | None:
        """Return the plain texts, None if not requested."""
        if self.text == NO_TEXT:
            return None
        try:
            texts, source = plain_texts(self.text or DEFAULT_TEXT, report)
        except JobError as error:
            if self.text is not None:
                raise
            report(f"{error}; cross-entropy is measured on {_OWN_ANSWERS}")
            return Texts(_OWN_ANSWERS, None)
        return Texts(source, texts)


def evaluate_trial(
    folder: RunFolder, number: int | None, asked: ComparisonRequest, events: Events, device: str | None = None
) -> Comparison:
    """Measure a trial's edit (None: the job's choice) against the base model and store the result.

    Raises UsageError without such a trial, HeldError if a run needs the device, and JobError for prompts, texts and
    benchmarks.
    """
    record, settings = folder.read_job(), job_settings(folder)
    trials = job_trials(folder)
    if not trials:
        raise UsageError(f"no trial of job {record.job_id} is finished", remedy="run it first")
    trial = trial_of(OpenJob(folder, JobFile(folder, record), settings, events), trials, number)
    harness, texts = asked.harness(), asked.texts(events.say)
    with looking(folder, events, device) as session:
        job = session.job
        pair = asked.prompts(settings, events.say, (session.prompts.good_report, session.prompts.bad_report))
        bench = bench_of(session.model, job.settings, pair, harness, events, job)
        events.say("measuring the base model")
        before, incoherence, references = bench.measure_base(bench.passages(texts))
        events.say(f"measuring trial {trial.number}")
        edits = session.hooks.activate([session.edit(trial)])
        (reason,) = edits.reasons
        if reason is not None:
            raise UsageError(f"trial {trial.number} cannot be measured: {reason}", remedy="choose another")
        after = bench.measure_edited(before.passages, references, edits, incoherence)
        detectors = _detected(scorer_context(job), bench, before, after)
        found = _comparison(f"job {record.job_id}", settings.model, trial.number, before, after, texts, detectors)
        write_record(folder.evaluation_file(trial.number), found)
        if found.scores:
            attach_benchmarks(folder, trial.number, found.scores, session.model.folder, events.say)
    return found


@dataclass(frozen=True)
class MeasuredPair:
    """A comparison and the models that were measured; `own_text` if the user named the plain text."""

    comparison: Comparison
    base: Subject
    edited: Subject
    own_text: bool


def evaluate_models(
    models: Sequence[str], base: str, settings: Settings, asked: ComparisonRequest, events: Events
) -> tuple[list[MeasuredPair], JobError | None]:
    """Measure models against a base model, which is measured once; one model is in memory at a time.

    Returns what was measured, and the error that ended it after the first model. Raises ImpossibleJobError,
    MachineError or JobError.
    """
    # A model that is missing is reported before prompts and texts are read, and these are read before any download.
    located = [locate(name, events.say) for name in (base, *models)]
    harness, texts = asked.harness(), asked.texts(events.say)
    pair = asked.prompts(settings, events.say)
    first = fetch_subject(located[0], None, events.say)
    others = [fetch_subject(one, asked.load_in, events.say) for one in located[1:]]
    found: list[MeasuredPair] = []
    with clear_faults():
        before = _measured_base(first, settings, pair, texts, harness, events)
        for model, other in zip(models, others, strict=True):
            release_memory()
            try:
                after, detectors = _measured_other(other, settings, pair, texts, harness, events, before)
            except JobError as error:
                if not found:
                    raise
                return found, error
            compared = _comparison(model, base, None, before.measured, after, texts, detectors)
            compared = compared.model_copy(update={"reading": other.reading(before.asked.dtype)})
            found.append(MeasuredPair(compared, first, other, asked.text is not None))
    return found, None


@dataclass(frozen=True)
class _Base:
    """Measurements of a base model, kept after it is freed; the KL reference is on the CPU."""

    measured: MeasuredModel
    references: KLReferences
    good: tuple[list[int], ...]
    asked: Asked


def _measured_base(
    subject: Subject, settings: Settings, pair: Pair, texts: Texts | None, harness: Harness | None, events: Events
) -> _Base:
    bench = opened(subject, settings, pair, harness, events)
    if settings.loading.response_prefix == "auto":
        bench = bench_of(with_response_prefix(bench.loaded, *pair, bench.rows), settings, pair, harness, events)
    measured, _, (reference, more) = bench.measure_base(bench.passages(texts), flagged=False)
    references = replace(reference, logits=reference.logits.cpu()), replace(more, logits=more.logits.cpu())
    return _Base(measured, references, bench.metrics.batches.good.tokens, Asked.of(bench.loaded))


def _measured_other(
    subject: Subject,
    settings: Settings,
    pair: Pair,
    texts: Texts | None,
    harness: Harness | None,
    events: Events,
    base: _Base,
) -> tuple[MeasuredModel, DetectorReport]:
    bench = opened(subject, settings, pair, harness, events, base.asked)
    words = bench.loaded.model.config.get_text_config().vocab_size
    alike = words == base.references[0].logits.shape[-1] and bench.metrics.batches.good.tokens == base.good
    if not alike:
        events.say("warning: the models' tokens or chat templates differ: KL divergence is not measured")
    if texts is None or texts.texts is None:
        passages = base.measured.passages if alike else []
    else:
        passages = bench.passages(texts)
    measured = bench.measure_edited(passages, base.references if alike else None)
    markers, behaviour = bench.metrics.markers, settings.card.behaviour
    context = Context(settings.scoring, markers, settings.loading, events.say, settings.judge, behaviour)
    return measured, _detected(context, bench, base.measured, measured)


def _detected(context: Context, bench: ModelBench, before: MeasuredModel, after: MeasuredModel) -> DetectorReport:
    good = len(bench.metrics.batches.good)
    return detect(context.scoring.detectors, context, before.exchanges, after.exchanges, good)


def _comparison(
    model: str,
    against: str,
    trial: int | None,
    before: MeasuredModel,
    after: MeasuredModel,
    texts: Texts | None,
    detectors: DetectorReport,
) -> Comparison:
    figures = after.figures
    divergences = [Divergence.of(1, after.first)] if after.first else []
    if figures.kl is not None and figures.kl_interval is not None:
        divergences.append(Divergence(tokens=figures.kl_tokens, mean=figures.kl, interval=figures.kl_interval))
    text = None
    if texts is not None and before.passages and len(before.passages) == len(after.passages):
        text = TextComparison.of(texts.source, _losses_and_counts(before), _losses_and_counts(after))
    return Comparison(
        model=model,
        against=against,
        trial=trial,
        base=before.figures,
        edited=figures,
        shares=shares_of(before.figures, figures),
        divergences=tuple(divergences),
        text=text,
        scores=paired_scores(before.scores, after.scores),
        detectors=detectors,
    )


def _losses_and_counts(measured: MeasuredModel) -> tuple[Sequence[float], Sequence[int]]:
    return measured.losses, [passage.count for passage in measured.passages]
