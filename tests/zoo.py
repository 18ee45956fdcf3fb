"""Tiny random models of many families, for properties of all causal language models."""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import (
    AutoModelForCausalLM,
    FalconH1Config,
    Gemma2Config,
    GPTNeoXConfig,
    JambaConfig,
    Lfm2Config,
    Llama4TextConfig,
    LlamaConfig,
    MambaConfig,
    MiniMaxConfig,
    MixtralConfig,
    MptConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3Config,
    Qwen3NextConfig,
)

_TINY = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
_CONFIGS: dict[str, Callable[..., PreTrainedConfig]] = {
    "llama": LlamaConfig,
    "qwen3": Qwen3Config,
    "gemma2": lambda **given: Gemma2Config(**given, sliding_window=8),
    "llama4": lambda **given: Llama4TextConfig(
        **given, attention_chunk_size=8, intermediate_size_mlp=48, num_local_experts=2
    ),
    "mixtral": lambda **given: MixtralConfig(**given, num_local_experts=4),
    "gpt-neox": GPTNeoXConfig,
    "mpt": lambda **given: MptConfig(**given, d_model=32, n_heads=4, n_layers=3),
    "jamba": lambda **given: JambaConfig(
        **given,
        attn_layer_period=2,
        attn_layer_offset=1,
        expert_layer_period=2,
        expert_layer_offset=1,
        num_experts=2,
        num_experts_per_tok=1,
        mamba_d_state=4,
    ),
    "falcon-h1": lambda **given: FalconH1Config(
        **given, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_n_groups=1, mamba_d_state=8, mamba_chunk_size=8
    ),
    "qwen3-next": lambda **given: Qwen3NextConfig(
        **given,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
    ),
    "lfm2": lambda **given: Lfm2Config(**given, full_attn_idxs=[1]),
    "mamba": lambda **given: MambaConfig(**given, state_size=4),
    "minimax": lambda **given: MiniMaxConfig(**given, num_local_experts=2, block_size=8),
}
FAMILIES = tuple(_CONFIGS)


def tiny_model(family: str) -> PreTrainedModel:
    """Return a random model of a family, float32; norm gains and biases are random, too."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(_CONFIGS[family](**_TINY)).eval()
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.1)
    return model
