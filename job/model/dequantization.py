"""Loading of models with quantised files: transformers dequantises each tensor as it reads it.

If the last blocks of FP8 matrices are smaller than the others, transformers divides a matrix into one equal
block per scale: that fails, or silently gives other weights. Here `job.numerics.dequantisation` replaces that
step; for whole blocks the two agree bit by bit. transformers also leaves weights that are not quantised in
their stored dtype, whatever dtype is requested.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import FineGrainedFP8Config, PretrainedConfig
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer

from job.errors import QuantisedSourceError
from job.model.quantization import DTYPE, block_of, quantisation_in
from job.numerics.dequantisation import dequantised_blocks

_METHOD = "fp8-of-any-shape"


class _Dequantize(Fp8Dequantize):  # type: ignore[misc]  # transformers' classes are untyped
    def _dequantize_one(self, quantized: Tensor, scales: Tensor, output_dtype: torch.dtype | None = None) -> Tensor:
        named = self.hf_quantizer.quantization_config.weight_block_size
        block = block_of(quantized.shape, scales.shape, tuple(named) if named else None)
        return dequantised_blocks(quantized, scales, block, output_dtype or getattr(torch, DTYPE))

    def convert(
        self, input_dict: dict[str, Any], full_layer_name: str | None = None, model: Any = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Dequantise a weight; a plain one gets the requested type, which transformers ignores."""
        found = super().convert(input_dict, full_layer_name=full_layer_name, model=model, **kwargs)
        dtype = self._get_target_dtype(model, full_layer_name)
        if dtype is None:
            return dict(found)
        if any(kept in str(full_layer_name) for kept in model._get_dtype_plan(dtype)):
            dtype = torch.float32
        return {
            name: [one.to(dtype) for one in value] if isinstance(value, list) else value.to(dtype)
            for name, value in found.items()
        }


@register_quantization_config(_METHOD)
class _Config(FineGrainedFP8Config):  # type: ignore[misc]
    pass


@register_quantizer(_METHOD)
class _Quantizer(FineGrainedFP8HfQuantizer):  # type: ignore[misc]
    def get_load_operations(self) -> dict[str, type]:
        return {"dequantize": _Dequantize}


def forget_quantisation(config: PretrainedConfig) -> Any:
    """Remove what a configuration says of quantisation, and return it; None: nothing."""
    text = config.get_text_config(decoder=True)
    described = getattr(config, "quantization_config", None) or getattr(text, "quantization_config", None)
    for part in (config, text):
        if hasattr(part, "quantization_config"):
            del part.quantization_config
    return described


def plain_loading_config(folder: Path, config: PretrainedConfig, quantization: str) -> PretrainedConfig:
    """Return the configuration with which transformers loads plain weights, dequantised if needed; changes `config`.

    `quantization` is the job's setting for loading. Raises QuantisedSourceError for files that cannot be dequantised,
    or would be quantised again.
    """
    found = quantisation_in(folder)
    described = forget_quantisation(config)
    if found is None or described is None:
        return config
    if quantization != "none":
        raise QuantisedSourceError(found.method, f"loading.quantization = {quantization} would quantise them again")
    method = _METHOD if found.method == "fp8" else described["quant_method"]
    config.quantization_config = {**described, "quant_method": method, "dequantize": True}
    config.dtype = getattr(torch, DTYPE)  # what the export is written in, where the job names no other
    return config
