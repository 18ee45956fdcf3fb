"""A tiny Llama and its GGUF file, as llama.cpp's converter writes it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

gguf: Any = pytest.importorskip("gguf")

TEMPLATE = "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}<s>assistant: "
SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
LETTERS = [*"abcdefghijklmnopqrstuvwxyz:<>/", "Ġ"]
VOCABULARY = ["<unk>", "<s>", "</s>", *LETTERS, "he"]
# llama.cpp's names for modules that transformers names differently.
NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


def tiny() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(VOCABULARY),
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        **SIZES,
    )
    model = LlamaForCausalLM(config)
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.1)
    return model


def in_rotary_pairs(weight: Tensor, heads: int) -> Tensor:
    """Return rows of q or k in llama.cpp's order, the two of each rotation adjacent."""
    return weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def write_gguf(file: Path, model: LlamaForCausalLM, template: str | None = TEMPLATE) -> None:
    """Write a model as llama.cpp's converter does, matrices in blocks of 4 bits with a minimum (Q4_1)."""
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(SIZES["hidden_size"])
    writer.add_block_count(SIZES["num_hidden_layers"])
    writer.add_feed_forward_length(SIZES["intermediate_size"])
    writer.add_head_count(SIZES["num_attention_heads"])
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(model.config.rms_norm_eps)
    writer.add_rope_dimension_count(16)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(VOCABULARY))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(VOCABULARY)
    writer.add_token_types([3, 3, 3, *[1] * (len(VOCABULARY) - 3)])
    writer.add_token_merges(["h e"])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    if template is not None:
        writer.add_chat_template(template)
    for name, tensor in model.state_dict().items():
        own = name.removeprefix("model.").removesuffix(".weight")
        if own == "lm_head":
            continue
        if own.startswith("layers."):
            _, layer, rest = own.split(".", 2)
            own = f"blk.{layer}.{NAMES[rest]}"
            heads = {"self_attn.q_proj": 4, "self_attn.k_proj": 2}.get(rest)
            tensor = in_rotary_pairs(tensor, heads) if heads else tensor
        own = {"embed_tokens": "token_embd", "norm": "output_norm"}.get(own, own)
        kind = gguf.GGMLQuantizationType.Q4_1 if tensor.dim() == 2 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(f"{own}.weight", gguf.quants.quantize(tensor.numpy(), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
