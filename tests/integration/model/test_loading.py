"""Loading: dtypes are proven, damaged and unfit models are refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from job.errors import ImpossibleJobError, MachineError
from job.model.loading import load_model
from tests.helpers import loading


def damage(folder: Path, change: object) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)  # type: ignore[operator]  # a function of the dictionary
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_dtypes_are_tried_in_order_until_one_generates(model_in_one_file: Path) -> None:
    assert load_model(model_in_one_file, loading("auto"), print).dtype == "float32"
    assert load_model(model_in_one_file, loading("bfloat16", "float32"), print).dtype == "bfloat16"

    def overflow(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = 1e30

    damage(model_in_one_file, overflow)  # fits float32 and bfloat16, is infinite in float16
    told: list[str] = []
    loaded = load_model(model_in_one_file, loading("float16", "float32"), told.append)
    assert loaded.dtype == "float32"
    assert len(told) == 1
    assert "float16" in told[0]


def test_nan_in_the_weights_is_told_by_tensor(model_in_one_file: Path) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.2.self_attn.q_proj.weight"][0, 0] = float("nan")

    damage(model_in_one_file, spoil)
    with pytest.raises(ImpossibleJobError, match=r"weight model\.layers\.2\.self_attn\.q_proj\.weight"):
        load_model(model_in_one_file, loading("auto", "float32"), print)


def test_weights_that_do_not_fit_the_configuration(model_in_one_file: Path) -> None:
    damage(model_in_one_file, lambda tensors: tensors.pop("model.norm.weight"))
    with pytest.raises(ImpossibleJobError, match=r"missing keys: model\.norm\.weight"):
        load_model(model_in_one_file, loading("auto"), print)


def test_a_truncated_file(model_in_one_file: Path) -> None:
    data = (model_in_one_file / "model.safetensors").read_bytes()
    (model_in_one_file / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(ImpossibleJobError, match="cannot be loaded"):
        load_model(model_in_one_file, loading("auto"), print)


def test_a_tokenizer_without_a_chat_template(model_in_one_file: Path) -> None:
    (model_in_one_file / "chat_template.jinja").unlink()
    with pytest.raises(ImpossibleJobError, match="no chat template"):
        load_model(model_in_one_file, loading("auto"), print)


def test_a_folder_without_tokenizer(model_in_one_file: Path) -> None:
    (model_in_one_file / "tokenizer.json").unlink()
    with pytest.raises(ImpossibleJobError, match="no usable tokenizer"):
        load_model(model_in_one_file, loading("auto"), print)


def test_a_device_that_is_not_there(model_in_one_file: Path) -> None:
    with pytest.raises(MachineError, match="no device cuda:77"):
        load_model(model_in_one_file, loading("auto", device="cuda:77"), print)


def test_a_damaged_index(model_in_one_file: Path) -> None:
    (model_in_one_file / "model.safetensors").rename(
        model_in_one_file / "model-00001-of-00001.safetensors"
    )  # it would precede the index
    (model_in_one_file / "model.safetensors.index.json").write_text(json.dumps({"weight_map": 3}))
    with pytest.raises(ImpossibleJobError, match="is damaged"):
        load_model(model_in_one_file, loading("auto"), print)
