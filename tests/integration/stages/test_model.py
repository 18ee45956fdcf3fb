"""The model of a job, loaded in this process."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.modules.module import register_module_forward_pre_hook

from job.data.prompts import PromptSets
from job.lifecycle.model_folder import model_folder
from job.lifecycle.running import OpenJob
from job.stages.evaluation import JobEvaluation
from job.stages.model import loaded_model
from job.storage.atomic import read_record
from job.storage.events import Events
from job.storage.job_file import JobFile
from job.storage.jobs import job_settings
from job.storage.run_folder import RunFolder
from tests.helpers import only_job


@contextmanager
def threads_of_forwards() -> Iterator[set[int]]:
    """Yield the numbers of threads that forwards within the block compute with."""
    seen: set[int] = set()

    def see(*_: Any) -> None:
        seen.add(torch.get_num_threads())

    before, handle = torch.get_num_threads(), register_module_forward_pre_hook(see)
    torch.set_num_threads(6)
    try:
        yield seen
    finally:
        handle.remove()
        torch.set_num_threads(before)


@pytest.fixture
def begun(finished: Path, tmp_path: Path) -> OpenJob:
    """Return a job with three workers whose first start has yet to load the model."""
    folder = RunFolder(shutil.copytree(only_job(finished), tmp_path / "job"))
    record = folder.read_job().model_copy(update={"resolution": None})
    return OpenJob(folder, JobFile(folder, record), job_settings(folder, workers=3), Events())


@pytest.mark.slow
def test_while_workers_start_a_run_loads_and_tries_its_model_with_its_share_of_the_threads(begun: OpenJob) -> None:
    """With all threads, each forward would wait for the core on which a worker loads its libraries."""
    prompts = read_record(begun.folder.prompts_file, PromptSets)
    source = model_folder(begun.record, begun.settings, begun.events)
    with threads_of_forwards() as seen:
        with loaded_model(begun, source, prompts, lambda _: 3):
            assert seen == {2}
            assert torch.get_num_threads() == 6  # what follows says itself what it shares
        seen.clear()
        with loaded_model(begun, source, prompts):  # without workers, such as for `chat`
            assert seen == {6}


@pytest.mark.slow
def test_a_worker_loads_its_model_with_its_share_of_the_threads(begun: OpenJob, finished: Path) -> None:
    record = only_job(finished) / "job.json"
    resolved = read_record(record, type(begun.record))
    prompts = read_record(begun.folder.prompts_file, PromptSets)
    with threads_of_forwards() as seen, JobEvaluation(resolved, begun.settings, prompts, 2).opened():
        assert seen == {2}
