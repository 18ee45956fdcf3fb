"""A worker's evaluator: opens a job's model once, and evaluates tasks that are values.

Light to import: processes import it before there is a job, and set their visible devices before torch is loaded.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from job.config.schema import Settings
from job.data.prompts import PromptSets
from job.errors import JobError
from job.records import EditParameters, JobRecord
from job.scoring.race import Race
from job.storage.events import Events
from job.storage.job_file import JobFile
from job.storage.run_folder import RunFolder
from job.system.tempdirs import scratch

if TYPE_CHECKING:
    from job.lifecycle.running import OpenJob
    from job.model.loading import LoadedModel
    from job.stages.session import ModelSession, SharedDirections


@dataclass(frozen=True)
class TrialsTask:
    """Edits that one worker scores in the same forwards.

    Attributes:
        rows: Most rows of a forward.
        whole: Score full-length responses, without the search's shortcuts.
        keep: Kinds of prompts whose responses the run judges.
        race: What the edits compete with; None: all prompts are answered.
    """

    edits: tuple[EditParameters, ...]
    rows: int
    whole: bool
    keep: tuple[str, ...] = ()
    race: Race | None = None


@dataclass(frozen=True)
class FinalistsTask:
    """Finalists that one worker measures in the same forwards, of at most `rows` rows; `keep` as for trials."""

    edits: tuple[EditParameters, ...]
    rows: int
    keep: tuple[str, ...] = ()


@dataclass(frozen=True)
class JobEvaluation:
    """What a worker needs of a job. It is sent to other machines, so it holds no secret.

    Attributes:
        record: job.json, with what the first start has resolved.
        settings: The settings of this start.
        prompts: All prompt sets.
        threads: CPU threads per worker.
    """

    record: JobRecord
    settings: Settings
    prompts: PromptSets
    threads: int

    @contextmanager
    def opened(self) -> Iterator[JobEvaluator]:
        """Yield an evaluator with the model loaded. Raises JobError if it cannot be, or has changed."""
        from job.lifecycle.model_folder import model_folder
        from job.lifecycle.running import OpenJob
        from job.model.devices import resolve_device
        from job.stages.model import cpu_threads, loaded_model

        with scratch("worker") as place:
            folder, events = RunFolder(place), Events(stream=io.StringIO())  # the run says all this itself
            job = OpenJob(folder, JobFile(folder, self.record), self.settings, events)
            with (
                cpu_threads(resolve_device(self.settings.loading.device), self.threads),
                loaded_model(job, model_folder(self.record, self.settings, events), self.prompts, proven=True) as model,
                ExitStack() as hooks,
            ):
                yield JobEvaluator(job, self.prompts, model, hooks)


class JobEvaluator:
    """Evaluates the tasks of one job."""

    def __init__(self, job: OpenJob, prompts: PromptSets, model: LoadedModel, hooks: ExitStack) -> None:
        """Take a loaded model, and the stack that will hold its hooks."""
        self._job = job
        self._prompts = prompts
        self._model = model
        self._hooks = hooks
        self._session: ModelSession | None = None

    @property
    def hardware(self) -> str:
        """The device that computes the model."""
        from job.model.devices import device_kind

        return device_kind(self._model.device)

    def share(self, value: SharedDirections) -> None:
        """Prepare for trials with these directions. Raises MachineError if learned ones cannot be written here."""
        from job.directions.learned import keep_learned
        from job.stages.session import model_session

        if value.learned is not None:
            keep_learned(self._job.folder, value.learned)
        self._hooks.close()
        self._session = self._hooks.enter_context(model_session(self._job, self._model, value.basis, self._prompts))
        self._session.scorer.prepare()

    def evaluate(self, task: Any) -> Any:
        """Return the outcomes of a TrialsTask or FinalistsTask, or the residuals of a ResidualsTask.

        Raises MemoryError.
        """
        from job.model.device_faults import Shortage, within_memory

        found = within_memory(partial(self._evaluated, task))
        if isinstance(found, Shortage):
            raise MemoryError(found.reason)
        return found

    def _evaluated(self, task: Any) -> Any:
        if isinstance(task, TrialsTask):
            assert self._session is not None
            return self._session.scorer.outcomes(task.edits, task.rows, task.whole, task.keep, task.race)
        if isinstance(task, FinalistsTask):
            assert self._session is not None
            return self._session.finalists.outcomes(task.edits, task.rows, task.keep)
        return task.extract(self._model)


def warm_up(model: Path | None) -> None:
    """Import slow libraries, and the code of the family of a model folder, if it exists yet."""
    import torch

    import job.stages.session  # noqa: F401
    from job.proof.truth_test import inspect_model

    if model is None:
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the run is at work meanwhile
    try:
        inspect_model(model)
    except JobError:
        return  # preflight tells what is wrong with it
    finally:
        torch.set_num_threads(threads)
