"""Small random twins of a model, built from its configuration alone.

A twin has the family's own classes, all layers and all switches; only widths, numbers of heads and experts, and the
vocabulary are small.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
)

from job.errors import UnbuildableModelError, UnsupportedArchitectureError, explaining, in_one_line, refusing

_WIDTH, _HEADS, _HEAD = 64, 4, 16
# Names of sizes in configurations, and their values in a twin. Heads times head width equals the stream's width, for
# families without a head width.
_SIZES: dict[str, int] = {
    **dict.fromkeys(
        ("hidden_size", "d_model", "n_embd", "emb_dim", "embedding_dim", "lru_width", "embedding_size"), _WIDTH
    ),
    **dict.fromkeys(
        ("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads", "num_query_groups"), _HEADS
    ),
    **dict.fromkeys(("swa_num_attention_heads", "encoder_attention_heads", "decoder_attention_heads"), _HEADS),
    **dict.fromkeys(("num_key_value_heads", "num_global_key_value_heads", "swa_num_key_value_heads"), 2),
    **dict.fromkeys(("head_dim", "dim_head", "d_head", "attention_head_dim", "attention_head_size"), _HEAD),
    **dict.fromkeys(("global_head_dim", "swa_head_dim", "swa_v_head_dim", "kv_channels"), _HEAD),
    **dict.fromkeys(("v_head_dim", "qk_nope_head_dim", "qk_rope_head_dim", "index_head_dim"), _HEAD),
    **dict.fromkeys(("linear_head_dim", "linear_key_head_dim", "linear_value_head_dim"), _HEAD),
    **dict.fromkeys(("linear_num_key_heads",), 2),
    # Few heads of an indexer would all score 0 for many tokens, and the choice among equal scores is arbitrary.
    "index_n_heads": 32,
    **dict.fromkeys(("linear_num_value_heads", "linear_num_heads"), 4),
    **dict.fromkeys(("qk_head_dim",), 2 * _HEAD),
    **dict.fromkeys(("rotary_dim",), 8),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "o_lora_rank", "adapter_rank"), 24),
    **dict.fromkeys(("intermediate_size", "intermediate_size_mlp", "ffn_dim", "n_inner", "dim_ff", "dff"), 80),
    **dict.fromkeys(("ffn_hidden_size", "d_inner", "encoder_ffn_dim", "decoder_ffn_dim"), 80),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size"), 40),
    **dict.fromkeys(("expert_ffn_hidden_size", "moe_shared_expert_intermediate_size"), 40),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts"), 2),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group"), 1),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads", "n_mamba_heads"), 8),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim", "mamba_headdim"), _HEAD),
    **dict.fromkeys(("mamba_d_ssm", "attention_hidden_size"), 2 * _WIDTH),
    **dict.fromkeys(("mamba_d_state", "state_size", "ssm_state_size", "mamba_chunk_size", "chunk_size"), 8),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), 101),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx"), 128),
    **dict.fromkeys(("hidden_size_per_layer_input", "nemo_conv_channels"), 24),
    "base_channels": 32,
}
# Sizes with another meaning in a family, or with constraints of its own.
_FAMILIES: dict[str, dict[str, int]] = {
    "dots3_note": {"head_dim": 2 * _HEAD},
    "dots3_note_text": {"head_dim": 2 * _HEAD},
    "falcon_h1": {"mamba_d_head": 8, "mamba_d_ssm": 64},
    "mamba2": {"num_heads": 8, "head_dim": _HEAD},
    "mistral4": {"qk_nope_head_dim": _HEAD // 2, "qk_rope_head_dim": _HEAD // 2, "qk_head_dim": _HEAD},
}
# One entry per pair of a head's rotated entries, for a twin's heads.
_ROTARY: dict[str, list[float]] = {
    "long_factor": [1.0] * (_HEAD // 2),
    "short_factor": [1.0] * (_HEAD // 2),
}
_SECTIONS = "mrope_section"
_DEPTHS = frozenset({"num_hidden_layers", "n_layer", "n_layers", "num_layers", "depth"})
_LARGEST = 300_000_000  # weights; anything not small in a twin would exhaust small machines
_MAPPINGS = {
    AutoModelForCausalLM: MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModelForImageTextToText: MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
}


def small_config(config: PretrainedConfig) -> PretrainedConfig:
    """Return a configuration of the same family and depth with small widths."""
    described = config.to_dict()
    text = config.get_text_config(decoder=True)
    small = _shrunk(described, _sizes(described), keep_depth=text is config)
    for part in config.sub_configs:
        value = described.get(part)
        if isinstance(value, dict):
            small[part] = _shrunk(value, _sizes(value), keep_depth=getattr(config, part) is text)
            rotary = small[part].get("rope_parameters")
            if isinstance(rotary, dict) and getattr(config, part) is text:
                rotary.setdefault(_SECTIONS, _sections(rotary))  # the default is for large models
    small.pop("quantization_config", None)  # a twin's weights are not quantised
    return type(config).from_dict({**small, "dtype": "float32"})


def _sizes(described: Mapping[str, Any]) -> dict[str, int]:
    sizes = {**_SIZES, **_FAMILIES.get(str(described.get("model_type")), {})}
    if described.get("num_key_value_heads") == described.get("num_attention_heads"):
        sizes["num_key_value_heads"] = sizes["num_attention_heads"]  # multi-head latent attention requires it
    return sizes


def _shrunk(described: Mapping[Any, Any], sizes: Mapping[str, int], *, keep_depth: bool) -> dict[Any, Any]:
    """Return a configuration's entries with small sizes, recursively."""
    small = {}
    for key, value in described.items():
        if isinstance(value, dict):
            value = _shrunk(value, sizes, keep_depth=keep_depth)
        elif key in sizes and _is_number(value) and value > 0:
            value = min(sizes[key], value)
        elif key in _ROTARY and isinstance(value, list):
            value = _ROTARY[key][: len(value)]
        elif key == _SECTIONS:
            value = _sections(described)
        elif key in _DEPTHS and not keep_depth:
            value = 1
        elif str(key).endswith("_token_id"):
            value = _token(value, sizes["vocab_size"])
        small[key] = value
    return small


def _sections(rotary: Mapping[Any, Any]) -> list[int]:
    """Divide the pairs of a head's rotated entries among time, height and width."""
    pairs = int(_HEAD * float(rotary.get("partial_rotary_factor") or 1)) // 2
    return [pairs - 2 * (3 * pairs // 8), 3 * pairs // 8, 3 * pairs // 8]


def _is_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _token(value: Any, count: int) -> Any:
    """Limit ids of special tokens to a small vocabulary."""
    if isinstance(value, list):
        return [_token(part, count) for part in value]
    return min(value, count - 1) if _is_number(value) else value


def auto_class(config: PretrainedConfig) -> Any:
    """Return the auto class of a configuration's whole model, or of a text model; None if there is none."""
    if _is_own(type(config)) and "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {}):
        return AutoModelForCausalLM
    fitting = [auto for auto, mapping in _MAPPINGS.items() if type(config) in mapping]
    whole = (auto for auto in fitting if _MAPPINGS[auto][type(config)].config_class is type(config))
    return next(whole, fitting[0] if fitting else None)


def _is_own(kind: type) -> bool:
    """Return whether a class comes from a model folder's own code."""
    return kind.__module__.startswith("transformers_modules.")


def empty_model(config: PretrainedConfig) -> PreTrainedModel:
    """Build a configuration's model without weights, on the meta device. Raises UnsupportedArchitectureError."""
    model_type = str(config.model_type)
    auto = auto_class(config)
    if auto is None or config.is_encoder_decoder:
        raise UnsupportedArchitectureError(model_type, "it is not a decoder-only language model")
    # A family may raise anything for numbers that do not go together.
    with explaining(lambda error: UnbuildableModelError(model_type, in_one_line(error))), torch.device("meta"):
        # A configuration of the model's own code exists only if that may run.
        model: PreTrainedModel = auto.from_config(config, trust_remote_code=_is_own(type(config)))
    return model


def small_twin(config: PretrainedConfig, seed: int = 0) -> PreTrainedModel:
    """Return a small random model of a configuration's family and depth (`twin_of`)."""
    return twin_of(empty_model(config), seed)


def twin_of(model: PreTrainedModel, seed: int = 0) -> PreTrainedModel:
    """Return a small float32 model of the same class and depth. Raises UnsupportedArchitectureError.

    All parameters are random, norm gains and biases too, so that no identity hides an omission.
    """
    model_type = str(model.config.model_type)
    build: Any = type(model)._from_config
    with refusing(model_type, "no small test copy of it can be built"):
        config = small_config(model.config)
        with torch.device("meta"):
            size = sum(parameter.numel() for parameter in build(config).parameters())
        if size > _LARGEST:
            raise UnsupportedArchitectureError(
                model_type, f"its small test copy is not small ({size / 1e6:.0f} million weights)"
            )
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            twin: PreTrainedModel = build(config, attn_implementation="eager").eval()
            for parameter in twin.parameters():
                parameter.data.add_(torch.randn_like(parameter) * 0.2)
    return twin
