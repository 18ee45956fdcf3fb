"""The workers of a job: engine, number and devices."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from job.config.load import default_values
from job.config.schema import Settings
from job.config.sections import S3Settings
from job.data.prompts import PromptSets
from job.lifecycle.running import RunningJob
from job.model.files import parse_model
from job.preflight.cuda import read_cuda
from job.records import Trial
from job.stages.choice import is_searched
from job.stages.evaluation import JobEvaluation, warm_up
from job.workers.executor import Executor
from job.workers.local import LocalEngine
from job.workers.ray_engine import RayEngine

if TYPE_CHECKING:
    from job.model.loading import LoadedModel


class Workers:
    """A job's executor, whose workers start once the model is known."""

    def __init__(self, job: RunningJob, trials: Sequence[Trial]) -> None:
        """Choose an engine; a local one starts processes at once, which import torch during preflight."""
        self._job = job
        self._wanted = job.record.searches and not is_searched(job, trials)
        self._engine: LocalEngine | RayEngine
        if job.settings.engine == "ray":
            self._engine = RayEngine(job.settings.address)
        else:
            source = parse_model(job.settings.model)
            model = Path(source.name) if source.kind == "folder" else None
            self._engine = LocalEngine(partial(warm_up, model), self._warm_processes())
        self.executor = Executor(self._engine, job.events)

    def _warm_processes(self) -> int:
        """Return the number of workers on a CPU; 0 on GPUs, where each worker gets its own device."""
        settings = self._job.settings
        if not self._wanted or settings.workers is None:
            return 0
        on_gpus = settings.loading.device != "cpu" and bool(read_cuda().devices)
        return 0 if on_gpus else settings.workers - 1

    def open(self, model: LoadedModel, prompts: PromptSets) -> None:
        """Start workers, unless nothing is left to evaluate. Raises UsageError or MachineError."""
        if not self._wanted:
            return
        from job.model.devices import device_kind

        evaluation = JobEvaluation(self._job.record, _without_targets(self._job.settings), prompts, self._place(model))
        self.executor.open(evaluation, device_kind(model.device))

    def count(self, model: LoadedModel) -> int:
        """Return how many processes can evaluate trials, this one included. Raises UsageError or MachineError."""
        self._place(model)
        return 1 + self._engine.capacity()

    def _place(self, model: LoadedModel) -> int:
        """Give each worker its devices; return its threads on a CPU."""
        from job.model.placement import placement
        from job.stages.model import cuda_devices, share_of_threads, worker_count

        settings, on_gpus = self._job.settings, model.device.type == "cuda"
        processes = worker_count(settings, model.device)
        threads = share_of_threads(processes)
        if isinstance(self._engine, RayEngine):
            gpus = sum(device.isdigit() for device in placement(model.model)) if on_gpus else 0
            cpus = 1 if on_gpus else max(1, (os.cpu_count() or 1) // processes)
            threads = cpus  # whatever OMP_NUM_THREADS says, which Ray passes on from one machine to all
            self._engine.use(None if settings.workers is None else processes - 1, gpus=gpus, cpus=cpus)
        else:
            self._engine.use(processes - 1, cuda_devices() if on_gpus else [])
        return threads


def _without_targets(settings: Settings) -> Settings:
    """Remove addresses of targets and mirrors, which may hold a password; workers need none."""
    s3 = S3Settings.model_validate(default_values()["s3"])
    return settings.model_copy(update={"upload": [], "checkpoint": None, "s3": s3})
