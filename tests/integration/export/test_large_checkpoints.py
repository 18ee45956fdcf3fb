"""An export needs no more memory than its largest tensors, is reproducible, and survives kills."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from job.storage.exports import DONE
from tests.processes import run_script, start_script

GIB = 1 << 30


@dataclass(frozen=True)
class Size:
    """The size of a model.

    Attributes:
        config: Its Llama configuration.
        shard: Maximum shard size, as `save_pretrained` takes it.
        stored: Its minimum size, bytes.
        room: Memory for an export beyond the tensors in work, bytes; both together are less than the model.
    """

    config: dict[str, int]
    shard: str
    stored: int
    room: int

    @property
    def largest(self) -> int:
        """Size of the largest tensor, bytes."""
        return self.config["vocab_size"] * self.config["hidden_size"] * 2


HEADS = {"num_attention_heads": 32, "num_key_value_heads": 4}
# 1.1 billion weights, and an eighth of it.
LARGE = Size(
    {**HEADS, "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "vocab_size": 32000},
    *("300MB", 2 * 10**9, GIB),
)
SMALL = Size(
    {**HEADS, "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 11, "vocab_size": 8000},
    *("36MB", 250 * 10**6, GIB // 8),
)
# A model in bfloat16, in shards, made without a copy in another type.
MAKE = """
import json, sys, torch
from transformers import LlamaConfig, LlamaForCausalLM
config = LlamaConfig(**json.loads(sys.argv[2]))
torch.manual_seed(0)
with torch.device("meta"):
    model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
model.to_empty(device="cpu")
for parameter in model.parameters():
    parameter.data.uniform_(-0.05, 0.05)
model.save_pretrained(sys.argv[1], max_shard_size=sys.argv[3])
"""
EXPORT = """
import resource, sys
from pathlib import Path
import torch
import transformers
from job.export.merged import Edit, seal, write_weights
from job.numerics.basis import Basis
from job.records import COMPONENTS, EditParameters, KernelParameters
from job.proof.truth_test import inspect_model

def refused(*_, **__):
    raise AssertionError("the whole model is being loaded or saved")

source, folder = map(Path, sys.argv[1:])
architecture = inspect_model(source)
transformers.PreTrainedModel.save_pretrained = refused
transformers.PreTrainedModel.from_pretrained = refused
directions = torch.randn(architecture.layer_count, architecture.width, generator=torch.Generator().manual_seed(1))
basis = Basis.single(torch.nn.functional.normalize(directions, dim=1))
kernel = KernelParameters(max_weight=1, max_weight_position=11, min_weight=0.3, min_weight_distance=30)
edit = Edit(EditParameters(direction_index=None, kernels=dict.fromkeys(COMPONENTS, kernel)), basis, "full")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print("begun", flush=True)
write_weights(source, folder, architecture, edit, lambda _: None)
print(1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))
seal(folder, lambda _: {})
"""


def export(source: Path, folder: Path) -> int:
    """Export in its own process and return its peak memory growth, bytes."""
    return int(run_script(EXPORT, source, folder).check().out.split()[-1])


def hashes(folder: Path) -> dict[str, str]:
    found = {}
    for path in sorted(folder.iterdir()):
        with path.open("rb") as stream:
            found[path.name] = hashlib.file_digest(stream, "sha256").hexdigest()
    return found


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "size",
    [pytest.param(SMALL, id="250 MB"), pytest.param(LARGE, id="2 GB", marks=pytest.mark.full("checkpoints"))],
)
def test_a_checkpoint_of_many_shards(size: Size, tmp_path: Path) -> None:
    source, whole, killed = (tmp_path / name for name in ("model", "whole", "killed"))
    run_script(MAKE, source, json.dumps(size.config), size.shard).check()
    shards = sorted(source.glob("*.safetensors"))
    assert len(shards) >= 8
    assert sum(shard.stat().st_size for shard in shards) > size.stored
    bound = 3 * size.largest + size.room
    assert bound < 0.75 * size.stored
    assert export(source, whole) <= bound
    assert (whole / DONE).exists()
    seed = int(os.environ.get("KILL_SEED", random.randrange(10**6)))
    print(f"KILL_SEED={seed}")
    process = start_script(EXPORT, source, killed, stdout=subprocess.PIPE)
    assert process.stdout is not None
    with process.stdout as output:
        assert output.readline() == "begun\n"
        deadline = time.monotonic() + 60
        reached = random.Random(seed).randrange(1, len(shards))
        while len(list(killed.glob("[!.]*.safetensors"))) < reached:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not (killed / DONE).exists()
    export(source, killed)
    edited, original = hashes(whole), hashes(source)
    assert hashes(killed) == edited
    index = (source / "model.safetensors.index.json").read_bytes()
    assert (whole / "model.safetensors.index.json").read_bytes() == index
    changed = [shard.name for shard in shards if edited[shard.name] != original[shard.name]]
    assert len(changed) >= 7
