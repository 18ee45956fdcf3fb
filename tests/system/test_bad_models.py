"""A model that is damaged, incomplete or in another format ends a job with one line, before anything is computed."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.helpers import abliterate, job_arguments

WRITER = "model.layers.1.mlp.down_proj.weight"


def truncated(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", 100_000)


def without_a_shard(folder: Path) -> None:
    names = list(load_file(folder / "model.safetensors"))
    shards = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    (folder / "model.safetensors").rename(folder / shards[0])
    places = {name: shards[index % 2] for index, name in enumerate(names)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def with_an_empty_promise(folder: Path) -> None:
    places = dict.fromkeys([*load_file(folder / "model.safetensors"), "model.nowhere.weight"], "model.safetensors")
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


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (truncated, "is damaged: it has 100000 bytes"),
        (without_a_shard, "lacks model-00002-of-00002.safetensors"),
        (with_an_empty_promise, "lacks model.nowhere.weight"),
        (of_another_shape, WRITER),
        (under_another_name, WRITER),
        (pickled, "convert the model with save_pretrained"),
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
