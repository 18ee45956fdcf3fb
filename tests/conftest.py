"""Fixtures shared by all tests, made once for all workers."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import pytest
import torch
from filelock import FileLock
from transformers import LlamaConfig, LlamaForCausalLM

from job.organism.tokenizer import build_tokenizer
from tests import organisms
from tests.fakes.cloud import RunPodServer, VastServer
from tests.helpers import STARTED, abliterate, job_arguments

pytest_plugins = ["tests.selection"]

# Ctrl-C is ignored by what a shell starts in the background, and by all that this starts; tests interrupt processes.
signal.signal(signal.SIGINT, signal.default_int_handler)
# On a busy machine an example may take any time.
hypothesis.settings.register_profile("default without deadline", deadline=None)
hypothesis.settings.load_profile("default without deadline")


def pytest_xdist_auto_num_workers() -> int:
    """Return three workers for two cores: tests also wait, for locks, servers and disks."""
    cores = len(os.sched_getaffinity(0))
    return cores + (cores + 1) // 2


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """Limit threads: workers share the cores, and too many threads make small models crawl."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _nothing_left_running() -> Iterator[None]:
    """Kill processes that a failed test left behind: a job might run for hours."""
    STARTED.clear()
    yield
    for process in STARTED:
        if process.poll() is None:
            process.kill()
            process.communicate()


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[Path], None]], Path]:
    """Return a function that makes a folder once for all workers."""
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent

    def make(name: str, build: Callable[[Path], None]) -> Path:
        folder = base / f"shared-{name}"
        with FileLock(base / f"{name}.lock"):
            if not folder.exists():
                building = base / f"building-{name}"
                build(building)
                building.rename(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def organism_of(
    shared: Callable[[str, Callable[[Path], None]], Path], pytestconfig: pytest.Config
) -> Callable[[str], Path]:
    """Return a function that gives the folder of a tiny organism of an architecture."""
    assert pytestconfig.cache is not None
    kept = pytestconfig.cache.mkdir("organism")
    return lambda arch: shared(f"organism-{arch}", lambda folder: organisms.write(arch, folder, kept))


@pytest.fixture(scope="session")
def full_organism(organism_of: Callable[[str], Path]) -> Path:
    """Return the folder of the tiny llama organism with 200 prompts per file; read-only."""
    return organism_of("llama")


@pytest.fixture(scope="session")
def organism(full_organism: Path, shared: Callable[[str, Callable[[Path], None]], Path]) -> Path:
    """Return the organism with 40 prompts per file, for all but exact figures; read-only."""

    def build(folder: Path) -> None:
        shutil.copytree(full_organism / "model", folder / "model")
        for file in full_organism.glob("*.txt"):
            lines = file.read_text().splitlines(keepends=True)
            (folder / file.name).write_text("".join(lines[:40]))

    return shared("brief", build)


@pytest.fixture(scope="session")
def finished_in_full(full_organism: Path, shared: Callable[[str, Callable[[Path], None]], Path]) -> Path:
    """Return a workspace with a finished job of 20 trials on all prompts; read-only."""

    def build(workspace: Path) -> None:
        abliterate("run", *job_arguments(full_organism), "--workspace", workspace, "--trials", 20).check()

    return shared("finished-in-full", build)


@pytest.fixture(scope="session")
def finished(organism: Path, shared: Callable[[str, Callable[[Path], None]], Path]) -> Path:
    """Return a workspace with a finished job of 20 trials on 40 prompts per file; read-only.

    It runs in a process of its own, as users run it. Jobs that tests run in-process are compared with it.
    """

    def build(workspace: Path) -> None:
        abliterate("run", *job_arguments(organism), "--workspace", workspace, "--trials", 20, cold=True).check()

    return shared("finished", build)


@pytest.fixture(scope="session")
def random_model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of an untrained model with biases, for tests of files and loading."""
    folder = tmp_path_factory.mktemp("random-model")
    tokenizer = build_tokenizer()
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=128,
            attention_bias=True,
            mlp_bias=True,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
        )
    )
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder, max_shard_size="40KB")
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def model_in_one_file(random_model_folder: Path, tmp_path: Path) -> Path:
    """Return a copy of the random model in a single file, for tests that damage it."""
    folder = tmp_path / "model"
    shutil.copytree(random_model_folder, folder, ignore=shutil.ignore_patterns("*safetensors*"))
    LlamaForCausalLM.from_pretrained(random_model_folder).save_pretrained(folder)
    return folder


@pytest.fixture
def faults(tmp_path: Path) -> Path:
    """Return the folder of planted faults."""
    folder = tmp_path / "faults"
    folder.mkdir()
    return folder


@pytest.fixture
def vast() -> Iterator[VastServer]:
    """Yield a rental platform without offers."""
    with VastServer() as server:
        yield server


@pytest.fixture
def runpod() -> Iterator[RunPodServer]:
    """Yield a rental platform with a few cards."""
    with RunPodServer() as server:
        server.add_gpu("NVIDIA GeForce RTX 4090", 24, 0.69, 0.34)
        server.add_gpu("NVIDIA RTX A6000", 48, 0.49, 0.33)
        server.add_gpu("NVIDIA A100 80GB PCIe", 80, 1.39, 1.19)
        server.add_gpu("NVIDIA H200", 141, 3.59, 3.59, availability="NONE")
        yield server
