"""A model with spread or offloaded weights is measured, edited and exported like one in one place."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from job.config.load import default_values
from job.config.sections import LoadingSettings
from job.data.prompts import Prompt
from job.edits.hooks import Intervention
from job.errors import ImpossibleJobError, MachineError, UsageError
from job.generation.answer import Answer
from job.generation.forward import RowTrials
from job.generation.greedy import greedy_answers
from job.model.loading import LoadedModel, load_model
from job.model.placement import let_go, placement, spread
from job.numerics.ablation import RowNormalization
from job.numerics.basis import Basis
from job.records import COMPONENTS, EditParameters, KernelParameters
from job.stages.model import require_resident
from tests.helpers import abliterate, job_arguments, only_job

KERNEL = KernelParameters(max_weight=1, max_weight_position=2, min_weight=0.5, min_weight_distance=9)
EDIT = EditParameters(direction_index=1.3, kernels=dict.fromkeys(COMPONENTS, KERNEL))
# Some layers in RAM, one on disk and one split between them.
SPREAD = {"": "cpu", "model.embed_tokens": "disk", "model.layers.1": "disk", "model.layers.2.mlp": "disk"}


def load(organism: Path, **changes: Any) -> LoadedModel:
    settings = LoadingSettings(**{**default_values()["loading"], **changes})
    return load_model(organism / "model", settings, lambda _: None)


def answers(loaded: LoadedModel, mode: RowNormalization) -> list[Answer]:
    count, width = loaded.architecture.layer_count, loaded.architecture.width
    directions = torch.randn(count, width, generator=torch.Generator().manual_seed(0))
    basis = Basis.single(torch.nn.functional.normalize(directions, dim=-1))
    prompts = loaded.tokenize([Prompt(user=f"How do I brew {number} cups of hexed tea?") for number in range(4)])
    with Intervention(loaded.model, loaded.architecture, basis, mode) as intervention:
        active = intervention.activate([EDIT])
        assert active.reasons == (None,)
        rows = RowTrials(torch.zeros(len(prompts), dtype=torch.long, device=loaded.device), active)
        return greedy_answers(loaded.model, prompts, limit=10, end_tokens=(), rows=rows)


@pytest.mark.parametrize(
    "changes", [{"device_map": SPREAD}, {"device_map": "auto", "max_memory": {"cpu": "300KB"}}], ids=["table", "auto"]
)
def test_offloaded_weights_are_edited_like_others(organism: Path, changes: dict[str, Any]) -> None:
    whole, offloaded = load(organism), load(organism, **changes)
    assert placement(whole.model).keys() == {"cpu"}
    assert placement(offloaded.model).keys() == {"cpu", "disk"}
    assert sum(placement(whole.model).values()) == sum(placement(offloaded.model).values())
    assert any(parameter.is_meta for parameter in offloaded.model.parameters())
    modes: list[RowNormalization] = ["none", "pre", "full", "column"]
    for mode in modes:
        assert answers(whole, mode) == answers(offloaded, mode)
    require_resident(whole, "adapter")
    require_resident(offloaded, "merged")
    with pytest.raises(ImpossibleJobError, match="adapter"):
        require_resident(offloaded, "adapter")


@pytest.mark.slow
def test_a_job_on_offloaded_weights_writes_the_same_bytes(organism: Path, tmp_path: Path) -> None:
    config = tmp_path / "spread.toml"
    config.write_text("[loading.device_map]\n" + "".join(f'"{name}" = "{place}"\n' for name, place in SPREAD.items()))
    written = []
    for name, options in (("whole", []), ("spread", ["--config", config])):
        workspace = tmp_path / name
        ended = abliterate("run", *job_arguments(organism), "--workspace", workspace, "--trials", 1, *options)
        assert ended.code == 0, ended.err
        assert ("on disk" in ended.err) == (name == "spread")
        written.append((only_job(workspace) / "export/model.safetensors").read_bytes())
    assert written[0] == written[1]


def test_a_table_that_does_not_fit_is_refused(organism: Path) -> None:
    with pytest.raises(UsageError, match=r"no device for .*embed_tokens"):
        load(organism, device_map={"model.layers": "cpu", "model.norm": "cpu", "lm_head": "cpu"})
    with pytest.raises(UsageError, match="not a device"):
        load(organism, device_map={"": "gpu"})
    with pytest.raises(MachineError, match="cuda:17"):
        load(organism, device_map={"": 17})


def test_tables_are_made_without_modules_within_others() -> None:
    model = torch.nn.ModuleDict({"a": torch.nn.ModuleDict({"b": torch.nn.Linear(1, 1), "c": torch.nn.Linear(1, 1)})})
    assert spread(model, {"": 0}) == {"": 0}
    assert spread(model, {"": 0, "a.c": "cpu"}) == {"a.b": 0, "a.c": "cpu"}
    assert spread(model, {"a.b": 1}) == {"a.b": 1, "a.c": None}
    assert spread(model, {"": 0, "a.b.bias": "disk"}) == {"a.b.weight": 0, "a.b.bias": "disk", "a.c": 0}


def test_a_model_that_is_let_go_holds_no_memory(organism: Path) -> None:
    for loaded in (load(organism), load(organism, device_map=SPREAD)):
        let_go(loaded.model)
        kept = [*loaded.model.parameters(), *loaded.model.buffers()]
        assert sum(tensor.numel() for tensor in kept if not tensor.is_meta) == 0


@pytest.mark.slow
def test_a_job_in_four_bits_exports_the_full_weights(organism: Path, tmp_path: Path) -> None:
    """bitsandbytes quantises on the CPU as on a GPU; the export is made from the files."""
    arguments = ("--workspace", tmp_path, "--trials", 1, "--set", "loading.quantization=bnb-4bit")
    ended = abliterate("run", *job_arguments(organism), *arguments)
    assert ended.code == 0, ended.err
    assert "export verified: KL " in ended.err
    whole, packed = load(organism), load(organism, quantization="bnb-4bit")
    assert sum(placement(packed.model).values()) < sum(placement(whole.model).values()) / 2
    base = load_file(organism / "model/model.safetensors")
    export = load_file(only_job(tmp_path) / "export/model.safetensors")
    edited = {writer.parameter for writer in whole.architecture.writers}
    assert {name for name, tensor in base.items() if not torch.equal(tensor, export[name])} == edited
    assert {tensor.dtype for tensor in export.values()} == {torch.float32}


@pytest.mark.slow
def test_a_job_in_float32_on_files_in_bfloat16_allows_for_the_export_being_rounded(
    organism: Path, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(organism / "model", model)
    tensors = load_file(model / "model.safetensors")
    rounded = {name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()}
    save_file(rounded, model / "model.safetensors", metadata={"format": "pt"})
    arguments = ("--workspace", tmp_path / "runs", "--trials", 1, "--set", 'loading.dtypes=["float32"]')
    ended = abliterate("run", model, *job_arguments(organism)[1:], *arguments)
    assert ended.code == 0, ended.err
    assert "loaded in float32" in ended.err
    assert "export verified: KL " in ended.err
    export = load_file(only_job(tmp_path / "runs") / "export/model.safetensors")
    assert {tensor.dtype for tensor in export.values()} == {torch.bfloat16}
