"""Files of weights: what is read, written and computed, by count; failures and stops."""

from __future__ import annotations

import json
import os
import shutil
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from job.errors import ExportMismatchError, ImpossibleJobError, Stopped
from job.export.merged import seal
from job.export.shards import WrittenShards
from job.model.safetensors_files import Checkpoint
from job.storage.atomic import sha256_file
from job.storage.exports import MANIFEST

SIDE, FILES = 512, 6


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of six files, each with an edited and three other tensors of 1 MiB."""
    folder = tmp_path_factory.mktemp("model")
    files: dict[str, str] = {}
    torch.manual_seed(0)
    for number in range(FILES):
        tensors = {f"{number}.{name}": torch.randn(SIDE, SIDE) for name in ("a", "edited", "z.x", "z.y")}
        save_file(tensors, folder / f"model-{number}.safetensors")
        files |= dict.fromkeys(tensors, f"model-{number}.safetensors")
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return folder


@dataclass
class Edits:
    """Negates the edited tensor of each file, and counts how many are computed, in all and at once."""

    checkpoint: Checkpoint
    seconds: float = 0.0
    fails: bool = False
    computed: int = 0
    now: int = 0
    most: int = 0

    def compute(self, name: str) -> Tensor:
        self.computed += 1
        self.now += 1
        self.most = max(self.most, self.now)
        if self.fails and self.computed == 1:
            raise ImpossibleJobError("the first one cannot be computed")
        time.sleep(self.seconds)
        self.now -= 1
        return -self.checkpoint.tensor(name)


def shards_of(model: Path, folder: Path, seconds: float = 0.0, *, fails: bool = False) -> tuple[WrittenShards, Edits]:
    checkpoint = Checkpoint(model)
    edits = Edits(checkpoint, seconds, fails)
    names = [f"{number}.edited" for number in range(FILES)]
    return WrittenShards(checkpoint, {name: partial(edits.compute, name) for name in names}, folder), edits


def test_a_source_that_changes_meanwhile_is_no_source(model: Path, tmp_path: Path) -> None:
    source, out = tmp_path / "model", tmp_path / "out"
    shutil.copytree(model, source)
    out.mkdir()
    shards, _ = shards_of(source, out)
    shards.write(lambda _: None)
    shards.verify()
    file = source / "model-3.safetensors"
    data = file.read_bytes()
    # Saved again, as a download or a sync does.
    (source / "new").write_bytes(data)
    (source / "new").replace(file)
    with pytest.raises(ExportMismatchError, match="changed while they were read"):
        shards.verify()


def test_each_byte_is_read_once_written_once_and_read_back_once(model: Path, tmp_path: Path) -> None:
    size = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    shards, edits = shards_of(model, tmp_path)
    counters = psutil.Process().io_counters
    before = counters()
    shards.write(lambda _: None)
    written = counters()
    shards.verify()
    verified = counters()
    seal(tmp_path, lambda _: {}, shards.hashes)
    sealed = counters()
    # Edited tensors are mapped, not read, so a quarter of the source is not in the count.
    assert 0.74 * size < written.read_chars - before.read_chars < 0.77 * size
    assert size <= written.write_chars - before.write_chars < 1.01 * size
    assert size <= verified.read_chars - written.read_chars < 1.01 * size
    assert sealed.read_chars - verified.read_chars < 0.01 * size
    assert sealed.write_chars - written.write_chars < 0.01 * size
    assert edits.computed == FILES
    assert edits.most == 1
    assert (tmp_path / MANIFEST).read_text().count(shards.hashes["model-0.safetensors"]) == 1


def test_what_is_written_is_the_edit_and_its_hash(model: Path, tmp_path: Path) -> None:
    shards, _ = shards_of(model, tmp_path)
    done: list[int] = []
    shards.write(done.append)
    shards.verify(done.append)
    assert done == [1] * 2 * FILES
    assert shards.hashes == {file.name: sha256_file(file) for file in tmp_path.glob("*.safetensors")}
    assert sorted(os.listdir(tmp_path)) == sorted(shards.hashes)
    for name in shards.hashes:
        before, after = load_file(model / name), load_file(tmp_path / name)
        for key, tensor in after.items():
            assert torch.equal(tensor, -before[key] if key.endswith("edited") else before[key])


@pytest.mark.parametrize("way", ["failure", "stop"])
def test_a_failure_or_a_stop_ends_all_files_and_a_repetition_writes_them(model: Path, tmp_path: Path, way: str) -> None:
    def advance(_: int) -> None:
        raise Stopped("SIGTERM")

    shards, edits = shards_of(model, tmp_path, fails=way == "failure")
    with pytest.raises(ImpossibleJobError if way == "failure" else Stopped):
        shards.write(advance)
    assert edits.computed == 1
    assert len(list(tmp_path.glob("[!.]*.safetensors"))) < FILES
    again, _ = shards_of(model, tmp_path)
    again.write(lambda _: None)
    again.verify()
    assert sorted(os.listdir(tmp_path)) == sorted(again.hashes)
