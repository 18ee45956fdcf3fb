"""Loading: dtypes are proven, damaged and unfit models are refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from job.errors import ImpossibleJobError, MachineError
from job.model.loading import load_model
from tests.helpers import loading


@pytest.fixture
def copy(random_model_folder: Path, tmp_path: Path) -> Path:
    """Return a copy of the random model in a single file, for tests that damage it."""
    folder = tmp_path / "model"
    shutil.copytree(random_model_folder, folder, ignore=shutil.ignore_patterns("*safetensors*"))
    AutoModelForCausalLM.from_pretrained(random_model_folder).save_pretrained(folder)
    return folder


def damage(folder: Path, change: object) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)  # type: ignore[operator]  # a function of the dictionary
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_dtypes_are_tried_in_order_until_one_generates(copy: Path) -> None:
    assert load_model(copy, loading("auto"), print).dtype == "float32"
    assert load_model(copy, loading("bfloat16", "float32"), print).dtype == "bfloat16"

    def overflow(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = 1e30

    damage(copy, overflow)  # fits float32 and bfloat16, is infinite in float16
    told: list[str] = []
    loaded = load_model(copy, loading("float16", "float32"), told.append)
    assert loaded.dtype == "float32"
    assert len(told) == 1
    assert "float16" in told[0]


def test_nan_in_the_weights_is_told_by_tensor(copy: Path) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.2.self_attn.q_proj.weight"][0, 0] = float("nan")

    damage(copy, spoil)
    with pytest.raises(ImpossibleJobError, match=r"weight model\.layers\.2\.self_attn\.q_proj\.weight"):
        load_model(copy, loading("auto", "float32"), print)


def test_weights_that_do_not_fit_the_configuration(copy: Path) -> None:
    damage(copy, lambda tensors: tensors.pop("model.norm.weight"))
    with pytest.raises(ImpossibleJobError, match=r"missing keys: model\.norm\.weight"):
        load_model(copy, loading("auto"), print)


def test_a_truncated_file(copy: Path) -> None:
    data = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(ImpossibleJobError, match="cannot be loaded"):
        load_model(copy, loading("auto"), print)


def test_a_tokenizer_without_a_chat_template(copy: Path) -> None:
    (copy / "chat_template.jinja").unlink()
    with pytest.raises(ImpossibleJobError, match="no chat template"):
        load_model(copy, loading("auto"), print)


def test_a_folder_without_tokenizer(copy: Path) -> None:
    (copy / "tokenizer.json").unlink()
    with pytest.raises(ImpossibleJobError, match="no usable tokenizer"):
        load_model(copy, loading("auto"), print)


def test_a_device_that_is_not_there(copy: Path) -> None:
    with pytest.raises(MachineError, match="no device cuda:77"):
        load_model(copy, loading("auto", device="cuda:77"), print)


def test_a_damaged_index(copy: Path) -> None:
    (copy / "model.safetensors").rename(copy / "model-00001-of-00001.safetensors")  # it would precede the index
    (copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": 3}))
    with pytest.raises(ImpossibleJobError, match="is damaged"):
        load_model(copy, loading("auto"), print)
