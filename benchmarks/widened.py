"""Embed an organism in a wider and deeper model that computes the same: larger models to time, with a behaviour.

The additions are computed without effect. The stream's extra dimensions are never written. Extra heads and neurons are
read but written with zeros, as are the layers inserted after the first ones. Responses have no end: the organism's end
token is an ordinary token of the larger model.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

# Layers are inserted after this many.
_BEFORE = 2


def widened(folder: Path, target: Path, width: int, layers: int) -> Path:
    """Write a Llama of the given width and depth with the responses of a smaller one; return its folder.

    Args:
        folder: The smaller one.
        target: Folder of the larger one.
        width: Its dimensions, a multiple of the smaller one's.
        layers: Its layers, no fewer than the smaller one's.
    """
    small = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.eos_token = tokenizer.unk_token
    config: LlamaConfig = small.config
    times, more = width // config.hidden_size, layers - config.num_hidden_layers
    own = {
        **config.to_dict(),
        **{"hidden_size": width, "num_hidden_layers": layers, "intermediate_size": times * config.intermediate_size},
        **{"num_attention_heads": times * config.num_attention_heads},
        **{"num_key_value_heads": times * config.num_key_value_heads},
        # The mean square is over this many times more dimensions.
        "rms_norm_eps": config.rms_norm_eps / times,
        "eos_token_id": tokenizer.unk_token_id,
    }
    torch.manual_seed(0)
    large = LlamaForCausalLM(LlamaConfig(**own))
    states = small.state_dict()
    with torch.no_grad():
        for name, parameter in large.state_dict().items():
            _fill(name, parameter, states.get(_source(name, more)), times)
    large.save_pretrained(target)
    tokenizer.save_pretrained(target)
    return target


def _source(name: str, more: int) -> str:
    """Return a parameter's name in the smaller model, "" in an inserted layer."""
    parts = name.split(".")
    if "layers" not in parts:
        return name
    at = parts.index("layers") + 1
    number = int(parts[at])
    if _BEFORE <= number < _BEFORE + more:
        return ""
    parts[at] = str(number if number < _BEFORE else number - more)
    return ".".join(parts)


def _fill(name: str, parameter: Tensor, source: Tensor | None, times: int) -> None:
    """Copy the smaller model's values; the rest stays random unless it would have an effect."""
    if any(writer in name for writer in ("o_proj", "down_proj", "embed_tokens")):
        parameter.zero_()
    if source is None:
        return
    share = times**-0.5 if name.endswith("norm.weight") else 1.0
    parameter[tuple(map(slice, source.shape))] = source * share
