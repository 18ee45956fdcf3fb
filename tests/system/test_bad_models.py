"""A model that is damaged, incomplete or in another format ends a job with one line, before anything is computed."""

from __future__ import annotations

import codecs
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save, save_file
from transformers import AutoModelForCausalLM

from tests.fakes.hub import LoopbackHub
from tests.helpers import abliterate, job_arguments, only_job

WRITER = "model.layers.1.mlp.down_proj.weight"


def truncated(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", 100_000)


def sharded(folder: Path) -> None:
    """Put the weights into two files with an index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    shards = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    places = {name: shards[index % 2] for index, name in enumerate(tensors)}
    for shard in shards:
        own = {name: tensor for name, tensor in tensors.items() if places[name] == shard}
        save_file(own, folder / shard, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def without_a_shard(folder: Path) -> None:
    sharded(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()


def with_an_empty_promise(folder: Path) -> None:
    file = (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    places = dict.fromkeys([*load_file(file), "model.nowhere.weight"], file.name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def of_another_shape(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors[WRITER] = tensors[WRITER][:, :-1].contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def under_another_name(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.down.weight"] = tensors.pop(WRITER)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def without_the_index(folder: Path) -> None:
    without_a_shard(folder)
    (folder / "model.safetensors.index.json").unlink()


def with_a_damaged_index(folder: Path) -> None:
    without_a_shard(folder)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": [}')


def of_more_layers(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": config["num_hidden_layers"] - 2}))


def with_an_undeclared_head(folder: Path) -> None:
    with_extra_heads(folder, count=2, declared=1)


def with_extra_heads(folder: Path, count: int, declared: int) -> dict[str, torch.Tensor]:
    """Add layers for multi-token prediction behind the others, as DeepSeek's files have them; return their tensors."""
    file, config = folder / "model.safetensors", folder / "config.json"
    tensors, described = load_file(file), json.loads(config.read_text())
    last = described["num_hidden_layers"] - 1
    heads = {
        name.replace(f"layers.{last}.", f"layers.{last + number}."): tensor * 2
        for number in range(1, count + 1)
        for name, tensor in tensors.items()
        if f"layers.{last}." in name
    }
    save_file({**tensors, **heads}, file, metadata={"format": "pt"})
    config.write_text(json.dumps({**described, "num_nextn_predict_layers": declared}))
    return heads


def with_an_adapter(folder: Path) -> None:
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "user/base"}')
    save_file({"a": load_file(folder / "model.safetensors")[WRITER]}, folder / "adapter_model.safetensors")


def of_an_adapter_alone(folder: Path) -> None:
    with_an_adapter(folder)
    for name in ("model.safetensors", "config.json"):
        (folder / name).unlink()


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (truncated, "is damaged: it has 100000 bytes"),
        (without_a_shard, "lacks model-00002-of-00002.safetensors"),
        (with_an_empty_promise, "lacks model.nowhere.weight"),
        (of_another_shape, WRITER),
        (under_another_name, WRITER),
        (pickled, "convert the model with save_pretrained"),
        (without_the_index, "neither model.safetensors nor model.safetensors.index.json"),
        (with_a_damaged_index, "model.safetensors.index.json is damaged"),
        (of_more_layers, "the files hold 8 layers, but config.json names 6"),
        (with_an_undeclared_head, "the files hold 10 layers, but config.json names 8"),
        (with_an_adapter, "holds a LoRA adapter beside the model"),
        (of_an_adapter_alone, "its base model is user/base"),
    ],
)
def test_a_bad_model_is_refused(spoil: Callable[[Path], None], told: str, organism: Path, tmp_path: Path) -> None:
    shutil.copytree(organism / "model", tmp_path / "model")
    spoil(tmp_path / "model")
    before = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    arguments = [tmp_path / "model", *job_arguments(organism)[1:], "--workspace", tmp_path / "runs"]
    for command in ("preflight", "run"):
        ended = abliterate(command, *arguments)
        assert ended.code == 3, ended.err
        assert told in (ended.out + ended.err if command == "run" else abliterate(command, *arguments, "--json").out)
        assert "Traceback" not in ended.err
    assert {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()} == before
    assert not list((tmp_path / "runs").glob("*/study.db"))


def test_declared_extra_heads_are_kept_untouched(organism: Path, tmp_path: Path) -> None:
    shutil.copytree(organism / "model", tmp_path / "model")
    heads = with_extra_heads(tmp_path / "model", count=2, declared=2)
    assert len(heads) > 10
    arguments = [tmp_path / "model", *job_arguments(organism)[1:], "--workspace", tmp_path / "runs"]
    abliterate("preflight", *arguments).check()
    abliterate("run", *arguments, "--trials", "1", "--set", "startup_trials=1").check()
    exported = load_file(only_job(tmp_path / "runs") / "export" / "model.safetensors")
    assert all(torch.equal(exported[name], tensor) for name, tensor in heads.items())
    assert not torch.equal(exported[WRITER], load_file(tmp_path / "model" / "model.safetensors")[WRITER])


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
@pytest.mark.parametrize("shards", [False, True])
def test_one_weight_that_is_not_finite_is_named(value: float, shards: bool, organism: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(organism / "model", model)
    if shards:
        sharded(model)
    (file,) = [file for file in model.glob("*.safetensors") if WRITER in load_file(file)]
    tensors = load_file(file)
    tensors[WRITER][5, 7] = value
    save_file(tensors, file, metadata={"format": "pt"})
    told = f"weight {WRITER} in {file} has values that are not finite"
    arguments = [model, *job_arguments(organism)[1:], "--workspace", tmp_path / "runs"]
    checked = abliterate("preflight", *arguments, "--json")
    assert checked.code == 3
    (failed,) = [check for check in json.loads(checked.out)["checks"] if check["status"] == "fail"]
    assert (failed["name"], failed["measured"]) == ("model.weights", told)
    abliterate("run", *arguments).fails(3, told)
    # As a larger model, whose weights preflight leaves to the loading.
    abliterate("run", *arguments, "--allow", "model.weights").fails(3, told)
    assert not list((tmp_path / "runs").rglob("residuals/*.safetensors"))


def with_a_stale_index(folder: Path) -> None:
    places = {"model.nowhere.weight": "model-00001-of-00009.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def with_shards_of_another_model(folder: Path) -> None:
    """Leave shards and their index beside the single file, with other weights."""
    shards = {name: tensor * 2 for name, tensor in load_file(folder / "model.safetensors").items()}
    file = "model-00001-of-00001.safetensors"
    save_file(shards, folder / file, metadata={"format": "pt"})
    places = {"metadata": {}, "weight_map": dict.fromkeys(shards, file)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(places))


def with_a_consolidated_copy(folder: Path) -> None:
    whole = (folder / "model.safetensors").rename(folder / "consolidated.safetensors")
    tensors = load_file(whole)
    file = "model-00001-of-00001.safetensors"
    save_file(tensors, folder / file, metadata={"format": "pt"})
    places = {"metadata": {}, "weight_map": dict.fromkeys(tensors, file)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(places))


@pytest.mark.parametrize(
    ("add", "aside"),
    [
        (with_a_stale_index, "model.safetensors.index.json"),
        (with_shards_of_another_model, "model-00001-of-00001.safetensors, model.safetensors.index.json"),
        (with_a_consolidated_copy, "consolidated.safetensors"),
    ],
)
def test_only_the_weights_that_transformers_loads_count(
    add: Callable[[Path], None], aside: str, organism: Path, tmp_path: Path
) -> None:
    shutil.copytree(organism / "model", tmp_path / "model")
    own = load_file(tmp_path / "model" / "model.safetensors")
    add(tmp_path / "model")
    arguments = [tmp_path / "model", *job_arguments(organism)[1:], "--workspace", tmp_path / "runs"]
    checked = abliterate("preflight", *arguments, "--json").check()
    checks = {check["name"]: check for check in json.loads(checked.out)["checks"]}
    assert checks["model.files"]["measured"].endswith(f"; not loaded: {aside}")
    assert checks["model.files"]["status"] == "warn"
    assert checks["model.weights"]["measured"].startswith(f"{len(own)} tensors")
    abliterate("run", *arguments, "--trials", "1", "--set", "startup_trials=1").check()
    export = only_job(tmp_path / "runs") / "export"
    edited = {name: tensor for file in export.glob("*.safetensors") for name, tensor in load_file(file).items()}
    assert edited.keys() == own.keys()
    assert [path.name for path in export.glob("consolidated*")] == []
    kept = [name for name, tensor in own.items() if "o_proj" not in name and "down_proj" not in name]
    assert all(bool((edited[name] == own[name]).all()) for name in kept)
    assert (export / "model.safetensors.index.json").exists() == (add is with_a_consolidated_copy)


@pytest.mark.parametrize("described", [{"load_in_4bit": True}, {"quant_method": "fp8"}], ids=["bitsandbytes", "fp8"])
def test_plain_weights_count_as_such_whatever_config_json_calls_them(
    described: dict[str, Any], organism: Path, tmp_path: Path
) -> None:
    shutil.copytree(organism / "model", tmp_path / "model")
    file, config = tmp_path / "model" / "model.safetensors", tmp_path / "model" / "config.json"
    own = {name: tensor.to(torch.bfloat16) for name, tensor in load_file(file).items()}
    save_file(own, file, metadata={"format": "pt"})
    config.write_text(json.dumps({**json.loads(config.read_text()), "dtype": "bfloat16"}))
    plain = json.loads(config.read_text())
    config.write_text(json.dumps({**plain, "quantization_config": described}))
    abliterate("inspect", tmp_path / "model").check()
    arguments = [tmp_path / "model", *job_arguments(organism)[1:], "--workspace", tmp_path / "runs"]
    checked = abliterate("preflight", *arguments, "--json").check()
    (weights,) = [check for check in json.loads(checked.out)["checks"] if check["name"] == "model.weights"]
    assert weights["status"] == "warn"
    assert "they are not quantised, although config.json has quantization_config" in weights["measured"]
    ran = abliterate("run", *arguments, "--trials", "1", "--set", "startup_trials=1").check()
    assert "although config.json has quantization_config" in ran.err
    export = only_job(tmp_path / "runs") / "export"
    assert json.loads((export / "config.json").read_text()) == plain
    assert "quantised" not in (export / "README.md").read_text()
    loaded = AutoModelForCausalLM.from_pretrained(export).state_dict()
    assert {tensor.dtype for tensor in loaded.values()} == {torch.bfloat16}
    assert not torch.equal(loaded[WRITER], own[WRITER])
    kept = [name for name in own if "o_proj" not in name and "down_proj" not in name]
    assert all(torch.equal(loaded[name], own[name]) for name in kept)


def test_headers_on_the_hub_tell_plain_weights_from_quantised_ones(organism: Path, tmp_path: Path) -> None:
    plain = {path.name: path.read_bytes() for path in (organism / "model").iterdir()}
    config = {**json.loads(plain["config.json"]), "quantization_config": {"load_in_4bit": True}}
    plain["config.json"] = json.dumps(config).encode()
    tensors = load_file(organism / "model" / "model.safetensors")
    packed = save({**tensors, WRITER: torch.zeros(100, 1, dtype=torch.uint8)}, metadata={"format": "pt"})
    with LoopbackHub() as hub:
        network = hub.environment(tmp_path / "home") | {"HF_HUB_OFFLINE": "0"}
        hub.add_model("kitchen/plain", plain)
        hub.add_model("kitchen/packed", {**plain, "model.safetensors": packed})
        for name, code in (("kitchen/plain", 0), ("kitchen/packed", 3)):
            words = [name, *job_arguments(organism)[1:], "--workspace", tmp_path / "runs"]
            for command in (["inspect", name], ["preflight", *words, "--json"]):
                ended = abliterate(*command, **network)
                assert ended.code == code, ended.out + ended.err
                assert ("files quantised with bitsandbytes cannot be edited" in ended.out) == bool(code)
        assert hub.errors == []


def replaced(before: bytes, after: bytes) -> Callable[[bytes], bytes]:
    def change(data: bytes) -> bytes:
        assert before in data
        return data.replace(before, after, 1)

    return change


# Changes of every file, as a broken download, an editor or another program leaves it.
CHANGES: dict[str, dict[str, Callable[[bytes], bytes]]] = {
    "config.json": {
        "a trailing comma": lambda data: data.rstrip()[:-1] + b",}",
        "empty": lambda _: b"",
        "a list": lambda _: b"[]",
        "a BOM": lambda data: codecs.BOM_UTF8 + data,
        "UTF-16": lambda data: data.decode().encode("utf-16"),
        "a number as text": replaced(b'"hidden_size": 64', b'"hidden_size": "64"'),
        "a huge number": replaced(b'"num_hidden_layers": 8', b'"num_hidden_layers": 99999999999'),
        "a negative number": replaced(b'"num_hidden_layers": 8', b'"num_hidden_layers": -1'),
        "nested without end": lambda _: b"[" * 100_000,
    },
    "generation_config.json": {"empty": lambda _: b"", "a list": lambda _: b"[]", "cut off": lambda data: data[:9]},
    "tokenizer_config.json": {"empty": lambda _: b"", "a list": lambda _: b"[]", "cut off": lambda data: data[:9]},
    "tokenizer.json": {"empty": lambda _: b"", "a list": lambda _: b"[]", "cut off": lambda data: data[:1000]},
    "model.safetensors": {
        "empty": lambda _: b"",
        "a huge header": lambda data: b"\xff" * 8 + data[8:],
        "a list as header": lambda data: data[:8] + b"[]" + b" " * (int.from_bytes(data[:8], "little") - 2),
        "another key": replaced(b'"dtype"', b'"dtypo"'),
        "another type": replaced(b'"F32"', b'"X32"'),
        "one offset": replaced(b'"data_offsets":[0,', b'"data_offsets":[  '),
    },
}


@pytest.mark.parametrize(
    ("name", "change"), [(name, change) for name, changes in CHANGES.items() for change in changes]
)
def test_a_changed_file_is_refused_or_does_no_harm(name: str, change: str, organism: Path, tmp_path: Path) -> None:
    shutil.copytree(organism / "model", tmp_path / "model")
    file = tmp_path / "model" / name
    file.write_bytes(CHANGES[name][change](file.read_bytes()))
    arguments = [tmp_path / "model", *job_arguments(organism)[1:], "--workspace", tmp_path / "runs"]
    checked = abliterate("preflight", *arguments, "--json")
    ran = abliterate("run", *arguments, "--trials", "1", "--set", "startup_trials=1")
    assert "Traceback" not in checked.err + ran.err
    assert checked.code == ran.code, ran.err
    assert checked.code in (0, 3)
    if checked.code:
        failed = [check for check in json.loads(checked.out)["checks"] if check["status"] == "fail"]
        assert all(check["remedy"] and "\n" not in check["measured"] for check in failed)
