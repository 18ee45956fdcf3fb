"""Quantise the files of models, as their makers do, and compute the values that the files represent."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

INDEX = "model.safetensors.index.json"
_FP4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])
_LEFT = ("embed_tokens", "lm_head", "mlp.gate.")


def quantise_fp8(
    folder: Path, block: int | None = 128, scales: torch.dtype = torch.float32, *, apart: bool = False
) -> dict[str, Tensor]:
    """Quantise the linear maps of a model's layers and return their dequantised values, float32.

    Args:
        folder: The model's folder, whose files are rewritten.
        block: Size of the square blocks, None for one scale per matrix.
        scales: Type of the scales.
        apart: Name of a separate file for all scales.
    """
    described = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": block and [block, block]}
    meant: dict[str, Tensor] = {}

    def quantised(name: str, weight: Tensor) -> dict[str, Tensor]:
        if weight.ndim != 2 or any(part in name for part in _LEFT):
            return {name: weight}
        high, wide = (block, block) if block else weight.shape
        tiles = [[tile.abs().max() for tile in row.split(wide, dim=1)] for row in weight.float().split(high)]
        largest = torch.tensor(tiles)
        factors = (largest / 448).clamp_min(1e-9)
        if scales in (torch.uint8, torch.float8_e8m0fnu):
            factors = factors.log2().ceil().exp2()
        rows, columns = torch.arange(weight.shape[0]) // high, torch.arange(weight.shape[1]) // wide
        spread = factors[rows][:, columns]
        values = (weight.float() / spread).to(torch.float8_e4m3fn)
        meant[name] = values.float() * spread
        kept = (factors.log2() + 127).to(torch.uint8) if scales == torch.uint8 else factors.to(scales)
        return {name: values, f"{name}_scale_inv": kept if block else kept.reshape(())}

    _rewrite(folder, described, quantised, "_scale_inv" if apart else None)
    return meant


def quantise_mxfp4(folder: Path) -> dict[str, Tensor]:
    """Quantise the experts of a gpt-oss model and return their dequantised values, float32."""
    meant: dict[str, Tensor] = {}

    def quantised(name: str, weight: Tensor) -> dict[str, Tensor]:
        if not name.endswith(("gate_up_proj", "down_proj")):
            return {name: weight}
        blocks = weight.float().mT.reshape(weight.shape[0], weight.shape[2], -1, 32)
        exponents = blocks.abs().amax(-1, keepdim=True).clamp_min(1e-30).log2().floor() - 2
        codes = (blocks[..., None] / exponents.exp2()[..., None] - _FP4).abs().argmin(-1)
        meant[name] = (_FP4[codes] * exponents.exp2()).flatten(2).mT
        packed = codes[..., 0::2] + 16 * codes[..., 1::2]
        scales = (exponents[..., 0] + 127).to(torch.uint8)
        return {f"{name}_blocks": packed.to(torch.uint8), f"{name}_scales": scales}

    _rewrite(folder, {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}, quantised, None)
    return meant


def quantise_compressed(folder: Path) -> dict[str, Tensor]:
    """Quantise the linear maps of a model's layers as llm-compressor's FP8_DYNAMIC does; return their values, float32.

    Weights have a scale per row. Activations are rounded while the model runs, with a scale per token.
    """
    number = {"num_bits": 8, "type": "float", "symmetric": True, "group_size": None, "block_structure": None}
    number |= {"actorder": None, "observer_kwargs": {}}
    weights = {**number, "strategy": "channel", "dynamic": False, "observer": "minmax"}
    activations = {**number, "strategy": "token", "dynamic": True, "observer": None}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": activations, "output_activations": None}
    described = {"quant_method": "compressed-tensors", "format": "float-quantized", "ignore": ["lm_head"]}
    described |= {"quantization_status": "compressed", "kv_cache_scheme": None, "global_compression_ratio": None}
    meant: dict[str, Tensor] = {}

    def quantised(name: str, weight: Tensor) -> dict[str, Tensor]:
        if weight.ndim != 2 or any(part in name for part in _LEFT):
            return {name: weight}
        scale = (weight.float().abs().amax(1, keepdim=True) / 448).to(torch.bfloat16)
        values = (weight.float() / scale.float()).to(torch.float8_e4m3fn)
        meant[name] = values.float() * scale.float()
        return {name: values, f"{name}_scale": scale}

    _rewrite(folder, {**described, "config_groups": {"group_0": group}}, quantised, None)
    return meant


def _rewrite(folder: Path, described: dict, quantised, apart: str | None) -> None:  # type: ignore[type-arg,no-untyped-def]
    others: dict[str, Tensor] = {}
    where: dict[str, str] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found: dict[str, Tensor] = {}
        for name, tensor in load_file(file).items():
            found |= quantised(name, tensor)
        taken = {name for name in found if apart and name.endswith(apart)}
        others |= {name: found.pop(name) for name in taken}
        save_file({name: tensor.contiguous() for name, tensor in found.items()}, file, metadata={"format": "pt"})
        where |= dict.fromkeys(found, file.name)
    if others:
        save_file(others, folder / "scales.safetensors", metadata={"format": "pt"})
        where |= dict.fromkeys(others, "scales.safetensors")
    if (folder / INDEX).exists():
        (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": where}))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": described}))
