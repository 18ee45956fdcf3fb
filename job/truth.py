"""The truth test: does projecting all discovered writers' outputs keep a direction out of the stream?

It runs on a small random twin of a model's family, built from its configuration alone, with random norm
gains and biases, before any weight is read.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from job.architectures import Architecture, UnsupportedArchitectureError, discover
from job.errors import ImpossibleJobError
from job.intervention import Intervention
from job.numerics.basis import Basis
from job.records import COMPONENTS, EditParameters, KernelParameters
from job.residuals import layer_outputs

TOLERANCE = 1e-4
# Widths of the twin; the width of the stream is unlike any other, so that no axis fits by accident.
_SMALL = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 101,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
_ROWS, _TOKENS = 3, 7


def read_config(folder: Path) -> PretrainedConfig:
    """Return the configuration of a model folder.

    Raises:
        ImpossibleJobError: The folder is not a model, or transformers does not know its family.
    """
    if not (folder / "config.json").is_file():
        what = "is not a model folder: it has no config.json" if folder.is_dir() else "does not exist"
        raise ImpossibleJobError(f"{folder} {what}", remedy="give the folder of a model in Hugging Face format")
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True)
    except (ValueError, OSError, KeyError) as error:
        first = str(error).strip().splitlines()[0]
        raise ImpossibleJobError(
            f"the configuration of {folder} cannot be used: {first}",
            remedy="the model needs a family that the installed transformers knows",
        ) from error


def small_twin(config: PretrainedConfig, seed: int = 0) -> PreTrainedModel:
    """Return a small random model of the same family and depth, in float32.

    All parameters are random, norm gains and biases included, so that no identity hides an omission.

    Raises:
        UnsupportedArchitectureError: Such a model cannot be built from the configuration.
    """
    changes = {key: value for key, value in _SMALL.items() if hasattr(config, key)}
    try:
        small = type(config).from_dict({**config.to_dict(), **changes, "dtype": "float32"})
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = AutoModelForCausalLM.from_config(small).eval()
            for parameter in model.parameters():
                parameter.data.add_(torch.randn_like(parameter) * 0.2)
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        raise UnsupportedArchitectureError(
            str(config.model_type), f"no small twin of it can be built ({str(error).splitlines()[0]})"
        ) from error
    return model


def largest_leak(model: PreTrainedModel, architecture: Architecture, seed: int = 0) -> tuple[int, float]:
    """Ablate a random direction from all writers and return where the stream still moves along it most.

    Returns:
        The layer and the share |v·(h_out - h_in)| / |h_out - h_in| there, the largest over all positions.
    """
    generator = torch.Generator().manual_seed(seed)
    direction = torch.randn(architecture.width, generator=generator)
    direction = direction / direction.norm()
    tokens = torch.randint(0, model.config.get_text_config().vocab_size, (_ROWS, _TOKENS), generator=generator)
    residuals: dict[int, Tensor] = {}
    layers = model.get_submodule(architecture.layers)
    assert isinstance(layers, nn.ModuleList)
    everywhere = KernelParameters(
        max_weight=1, max_weight_position=0, min_weight=1, min_weight_distance=architecture.layer_count
    )
    edit = EditParameters(direction_index=None, kernels=dict.fromkeys(COMPONENTS, everywhere))
    basis = Basis.single(direction.expand(architecture.layer_count, -1))
    with (
        torch.inference_mode(),
        Intervention(model, architecture, basis, "none") as intervention,
        layer_outputs(layers, residuals.__setitem__),
    ):
        intervention.activate([edit])
        intervention.rows = torch.zeros(_ROWS, dtype=torch.long)
        model.get_decoder()(input_ids=tokens, use_cache=False)
    shares = []
    for layer in range(architecture.layer_count):
        added = (residuals[layer + 1] - residuals[layer]).to(torch.float64)
        shares.append(float(((added @ direction.double()).abs() / added.norm(dim=-1)).max()))
    worst = max(range(len(shares)), key=shares.__getitem__)
    return worst, shares[worst]


def inspect_model(folder: Path) -> Architecture:
    """Return the structure of a model, from its configuration alone, proven by the truth test.

    Raises:
        ImpossibleJobError: The folder is not a model.
        UnsupportedArchitectureError: The model's family cannot be edited completely.
    """
    config = read_config(folder)
    twin = small_twin(config)
    architecture = discover(twin)
    layer, share = largest_leak(twin, architecture)
    if not share < TOLERANCE:
        raise UnsupportedArchitectureError(
            str(config.model_type),
            f"after ablating a direction from all known residual writers, layer {layer} "
            f"still writes {share:.1e} of its output along it",
        )
    return architecture


def inspection(folder: Path) -> dict[str, Any]:
    """Return what `abliterate inspect --json` prints (DESIGN section 6)."""
    config = read_config(folder)
    found: dict[str, Any] = {
        "supported": False,
        "reason": None,
        "model_type": str(config.model_type),
        "layers": int(config.get_text_config().num_hidden_layers),
        "writers": [],
    }
    try:
        architecture = inspect_model(folder)
    except UnsupportedArchitectureError as error:
        return {**found, "reason": error.reason}
    writers: list[dict[str, Any]] = [
        {
            "layer": writer.layer,
            "component": writer.component,
            "parameter": writer.parameter,
            "bias": writer.bias,
            "axis": writer.axis,
            "post_norm": [],
            "post_norm_bias": None,
        }
        for writer in architecture.writers
    ]
    return {**found, "supported": True, "layers": architecture.layer_count, "writers": writers}
