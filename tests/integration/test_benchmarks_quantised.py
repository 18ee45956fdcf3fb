"""The edited GGUF file of the benchmark differs from its source in the edited weights alone."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from job.realmodel.conversion import convert
from tests.tiny_gguf import gguf, tiny, write_gguf

from benchmarks.quantised import write_with_weights_of  # isort: skip - it needs gguf, too


def test_a_gguf_file_takes_the_edited_weights_and_keeps_all_others(tmp_path: Path) -> None:
    source, edited, export = tmp_path / "tiny.gguf", tmp_path / "edited.gguf", tmp_path / "export"
    write_gguf(source, tiny())
    convert(source, export)
    weights = load_file(export / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    weights[name] = weights[name] + 0.25 * torch.randn(weights[name].shape).to(weights[name])
    save_file(weights, export / "model.safetensors", metadata={"format": "pt"})
    write_with_weights_of(export, source, edited)
    before, after = ({t.name: t.data.tobytes() for t in gguf.GGUFReader(file).tensors} for file in (source, edited))
    assert before.keys() == after.keys()
    assert all(before[name] == after[name] for name in before if "attn_output" not in name and "ffn_down" not in name)
    convert(edited, tmp_path / "again")
    found = load_file(tmp_path / "again" / "model.safetensors")
    assert found.keys() == weights.keys()
    for each, weight in weights.items():
        steps = (weight.max() - weight.min()).float() / 15 if "o_proj" in each or "down_proj" in each else 0.0
        assert bool(((found[each] - weight).abs() <= steps).all()), each
