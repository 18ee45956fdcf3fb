"""The model of a job: loaded with the dtype fixed at its first start, and monitored."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from job.architectures.discovery import decoder_of
from job.architectures.spec import Architecture, require_modes
from job.config.schema import Settings
from job.config.sections import AblationSettings
from job.data.prompts import Prompt, PromptSets
from job.directions.response_prefix import with_response_prefix
from job.errors import ImpossibleJobError
from job.lifecycle.running import OpenJob
from job.model.device_faults import Watchdog, clear_faults
from job.model.devices import hardware, resolve_device
from job.model.loading import LoadedModel, load_model
from job.model.placement import placement
from job.model.rendering import Rendering, conversations, shows_date
from job.model.safetensors_files import Checkpoint
from job.preflight.checks import size
from job.proof.truth_test import inspect_model
from job.records import DEFAULT_OBJECTIVES, TRIALS_PER_WORKER, ExportFormat, JobRecord, PullBack, Resolution
from job.scoring.race import first_round
from job.scoring.trial_scorer import TrialScorer
from job.search.method import first_method
from job.stages.measuring import metrics_of, scorer_of
from job.text.behaviour import words_of
from job.text.refusal_markers import RefusalMarkers
from job.tuning.batch_size import Tuner

# Rows per forward without a preflight plan, if that failure was allowed; halved until they fit.
_ROWS = 32
# Excess over a device's planned weights that is worth a warning.
_PLAN_TOLERANCE = 0.1


@contextmanager
def loaded_model(
    job: OpenJob,
    source: Path,
    prompts: PromptSets,
    workers: Callable[[LoadedModel], int] | None = None,
    *,
    proven: bool = False,
) -> Iterator[LoadedModel]:
    """Yield the base model; device faults become JobErrors, and a hanging forward ends the process.

    The job's first start resolves and pins dtype, batches, rows per forward and response prefix. `workers` counts the
    processes that will evaluate trials, by default those of this machine; they may be starting, so this process
    computes with its share of the CPU's threads until it has yielded. `proven` skips the proof.

    Raises ImpossibleJobError or MachineError.
    """
    settings = job.settings
    threads = partial(own_threads, settings) if workers else nullcontext
    if not proven:
        with threads():
            _prove(job, source)
    model = _load(job, source, threads())
    require_resident(model, settings.export_format)
    conversations(model.tokenizer, prompts.everything, model.rendering)  # all at once, by one process
    watchdog = Watchdog(settings.hang_seconds, job.folder.stacks_file)
    with clear_faults(), watchdog.watching(decoder_of(model.model)):
        if job.record.resolution is None:
            count = workers(model) if workers else worker_count(settings, model.device)
            with threads():
                _resolve(job, model, prompts, count)
        model = as_resolved(model, job.record)
        yield replace(model, architecture=as_edited(model.architecture, settings.ablation, job.resolution))


def _prove(job: OpenJob, source: Path) -> None:
    settings = job.settings
    architecture = inspect_model(source, settings.loading.trust_remote_code)
    require_modes(architecture, settings.ablation.row_normalization, settings.export_format)
    Checkpoint(source).require_writers(architecture)
    job.events.emit(
        "architecture",
        f"architecture: {architecture.model_type}, {architecture.layer_count} layers, "
        f"{len(architecture.writers)} residual writers, proven complete",
    )


def _load(job: OpenJob, source: Path, threads: AbstractContextManager[None]) -> LoadedModel:
    record, events = job.record, job.events
    events.emit("loading", "loading the model")
    dtype = record.resolution.dtype if record.resolution else record.planned_dtype
    with events.progress("loading the model", 1), threads:
        model = load_model(source, job.settings.loading, events.say, dtype=dtype, rendering=rendering_of(record))
    weights, planned = placement(model.model), record.planned_weights or {}
    shares = ", ".join(f"{size(count)} on {device}" for device, count in weights.items())
    events.emit("loaded", f"loaded in {model.dtype}: {shares}", hardware=hardware(model.device), placement=weights)
    for device, count in weights.items():
        if device in planned and count > planned[device] * (1 + _PLAN_TOLERANCE):
            events.say(f"warning: the plan was {size(planned[device])} of weights on {device}")
    return model


def rendering_of(record: JobRecord) -> Rendering:
    """Return the chat template's options for a job's model."""
    options = record.resolution.options if record.resolution else None
    return Rendering(record.prompt_date, tuple(sorted((options or {}).items())))


def as_resolved(model: LoadedModel, record: JobRecord) -> LoadedModel:
    """Return a model with the job's resolved prefix and template options."""
    resolution = record.resolution
    assert resolution is not None
    return replace(
        model,
        response_prefix=resolution.response_prefix,
        prefix_tokens=resolution.prefix_tokens,
        rendering=rendering_of(record),
        turn_end=resolution.turn_end,
    )


def as_edited(architecture: Architecture, ablation: AblationSettings, resolution: Resolution) -> Architecture:
    """Return the structure with norms as a job's edits take account of them."""
    if not ablation.through_norms:
        return architecture.without_norms()
    return architecture.pulled_back(resolution.pull_back or "gain")


def _pull_back(ablation: AblationSettings, architecture: Architecture) -> PullBack | None:
    if not (architecture.norms and ablation.through_norms):
        return None
    return "dual" if ablation.pull_back == "auto" else ablation.pull_back


def _resolve(job: OpenJob, model: LoadedModel, prompts: PromptSets, workers: int) -> None:
    record, settings = job.record, job.settings
    rows = settings.batching.rows or record.planned_rows or _ROWS
    with job.events.progress("finding the common prefix of responses", 1):
        model = _with_prompt_format(model, settings, prompts, rows)
    _report_prompt_format(job, model)
    trials = settings.trials_per_batch or TRIALS_PER_WORKER * workers
    together = settings.batching.trials or -(-trials // workers)
    ahead = settings.search.ahead if settings.search.ahead is not None else int(workers > 1)
    if settings.tune:

        def scorer(good: Sequence[Prompt], bad: Sequence[Prompt], rows: int) -> TrialScorer:
            markers = RefusalMarkers(settings.scoring.refusal_markers)
            return scorer_of(metrics_of(model, settings, markers, good, bad, rows, job.events))

        workspace, batch = job.folder.path.parent, min(together, trials)
        rows = Tuner(workspace, record, settings, prompts, model, scorer, batch, workers, job.events).rows(rows)
    job.file.pin(
        resolution=Resolution(
            dtype=model.dtype,
            rows=rows,
            layers=model.architecture.layer_count,
            response_prefix=model.response_prefix,
            together=together,
            norms=model.architecture.norms,
            prefix_tokens=model.prefix_tokens or None,
            date=record.prompt_date if shows_date(model.tokenizer) else None,
            options=dict(model.rendering.options) or None,
            turn_end=model.turn_end,
            batch=trials,
            ahead=ahead,
            racing=_racing(settings, prompts),
            topic_words=True,
            evasions=_counts_evasions(settings),
            pull_back=_pull_back(settings.ablation, model.architecture),
            choice="bounds",
            method=first_method(settings.search.asked_method),
        )
    )


def _racing(settings: Settings, prompts: PromptSets) -> int:
    plain = tuple(settings.search.objectives) == DEFAULT_OBJECTIVES
    return first_round(len(prompts.bad_search)) if settings.search.racing and plain else 0


def _counts_evasions(settings: Settings) -> bool:
    asked = settings.scoring.evasions
    return words_of(settings.card.behaviour).refuses if asked is None else asked


def _with_prompt_format(model: LoadedModel, settings: Settings, prompts: PromptSets, rows: int) -> LoadedModel:
    """Return the model with its response prefix and missing end-of-turn token."""
    model = model.ending_its_turn()
    prefix = settings.loading.response_prefix
    if prefix == "auto":
        return with_response_prefix(model, prompts.good, prompts.bad, rows)
    return replace(model, response_prefix=prefix)


def _report_prompt_format(job: OpenJob, model: LoadedModel) -> None:
    if model.rendering.options:
        options = ", ".join(f"{name} = {str(value).lower()}" for name, value in model.rendering.options)
        job.events.emit("template_options", f"the chat template is rendered with {options}")
    if model.response_prefix:
        job.events.emit("response_prefix", f"every response begins with the prefix {model.response_prefix!r}")
    if model.turn_end is not None:
        token = str(model.tokenizer.decode([model.turn_end]))
        job.events.emit("turn_end", f"responses end at {token!r}, with which the chat template ends a turn")


def require_resident(model: LoadedModel, form: ExportFormat) -> None:
    """Raise ImpossibleJobError for an adapter on offloaded weights: PEFT cannot attach one."""
    if form == "adapter" and any(parameter.is_meta for parameter in model.model.parameters()):
        raise ImpossibleJobError(
            "an adapter cannot be verified on offloaded weights",
            remedy="use export_format = merged, or loading.device_map = single or balanced",
        )


def worker_count(settings: Settings, device: torch.device) -> int:
    """Return the number of processes that evaluate trials here: one per GPU if one holds the whole model."""
    if settings.workers is not None:
        return settings.workers
    one_gpu_each = settings.loading.device == "auto" and settings.loading.device_map == "single"
    return max(1, len(cuda_devices())) if one_gpu_each and device.type == "cuda" else 1


def share_of_threads(processes: int) -> int:
    """Return how many threads each of several processes of this machine computes with on the CPU."""
    return max(1, torch.get_num_threads() // processes)


@contextmanager
def cpu_threads(device: torch.device, count: int) -> Iterator[None]:
    """Compute with `count` threads within the block if the model's device is the CPU."""
    before = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def own_threads(settings: Settings) -> AbstractContextManager[None]:
    """Compute with this process's share of the CPU's threads: others wait for a core, and all threads for them."""
    device = resolve_device(settings.loading.device)
    return cpu_threads(device, share_of_threads(worker_count(settings, device)))


def cuda_devices() -> list[str]:
    """Return the visible CUDA devices as `CUDA_VISIBLE_DEVICES` lists them."""
    count = torch.cuda.device_count()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return visible.split(",")[:count] if visible else [str(number) for number in range(count)]
