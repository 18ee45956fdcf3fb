"""The planner's activation memory against all live tensors of real models while they decode."""

from __future__ import annotations

import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from job.architectures.structure import discover
from job.edits.hooks import Intervention
from job.errors import ImpossibleJobError
from job.generation.forward import RowTrials
from job.generation.greedy import greedy_answers
from job.numerics.ablation import RowNormalization
from job.numerics.basis import Basis
from job.preflight.activation_memory import Batch, Edits, activation_bytes, cache_bytes, scoring_bytes
from job.preflight.model_facts import ModelFacts, Weights, model_facts
from job.records import READ_TOKENS, EditParameters, KernelParameters

FAMILIES: dict[str, tuple[type[Any], type[Any]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}
SMALL = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 300,
    "sliding_window": None,
}


def build(family: str, dtype: torch.dtype = torch.float32, **changes: Any) -> PreTrainedModel:
    config, model = FAMILIES[family]
    torch.manual_seed(0)
    built: PreTrainedModel = model(config(**{**SMALL, **changes})).to(dtype).eval()
    return built


NAMES = {torch.float32: "F32", torch.bfloat16: "BF16"}


def facts_of(model: PreTrainedModel) -> ModelFacts:
    """Return the facts as read from disk: the configuration, and the names, types and shapes in the files."""
    tied = model.config.tie_word_embeddings
    tensors = {
        name: (NAMES[tensor.dtype], tuple(tensor.shape))
        for name, tensor in model.state_dict().items()
        if not (tied and name == "lm_head.weight")
    }
    return model_facts(json.loads(model.config.to_json_string()), tensors)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all live storages that operations allocate."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.now = self.peak = 0
        tensors = (*model.parameters(), *model.buffers())
        self._known = {tensor.untyped_storage()._cdata for tensor in tensors}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                storage = leaf.untyped_storage()
                key = storage._cdata
                if key not in self._known:
                    self._known.add(key)
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self._free, key, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return result

    def _free(self, key: int, count: int) -> None:
        self._known.discard(key)
        self.now -= count


def measured_peak(model: PreTrainedModel, batch: Batch, rows: RowTrials | None = None) -> int:
    """Return the peak of all live tensors but the weights while a batch of unequal prompts is answered.

    One long response is decided before the last token, so that the remaining rows are copied, for which there was room.
    """
    vocabulary = model.config.vocab_size
    prompts = [torch.randint(0, vocabulary, (batch.prompt_tokens - row % 3,)).tolist() for row in range(batch.rows)]
    with LiveBytes(model) as live:
        greedy_answers(
            model,
            prompts,
            limit=batch.answer_tokens,
            end_tokens=set(),
            decided=lambda index, tokens: index == 0 and len(tokens) == batch.answer_tokens - 1 > 32,
            rows=rows,
        )
    return live.peak


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("family", "changes", "batch"),
    [
        ("llama", {}, (8, 48, 4)),
        ("llama", {"num_key_value_heads": 8}, (8, 48, 4)),
        ("qwen2", {"intermediate_size": 700, "tie_word_embeddings": True}, (4, 60, 6)),
        ("qwen3", {}, (8, 48, 4)),
        ("qwen3", {"head_dim": 32}, (8, 48, 4)),
        ("qwen3", {"intermediate_size": 32, "head_dim": 4}, (8, 48, 4)),
        ("llama", {"vocab_size": 20000}, (8, 6, 3)),
        ("llama", {}, (8, 4, 90)),
        ("llama", {"num_key_value_heads": 8}, (8, 4, 90)),
        ("mistral", {}, (8, 40, 12)),
    ],
)
def test_activations_against_live_tensors(
    family: str, changes: dict[str, Any], batch: tuple[int, int, int], dtype: torch.dtype
) -> None:
    model = build(family, dtype, **changes)
    facts, planned = facts_of(model), Batch(rows=batch[0], prompt_tokens=batch[1], answer_tokens=batch[2])
    cache = cache_bytes(facts, planned, dtype.itemsize)
    measured = measured_peak(model, planned)
    predicted = activation_bytes(facts, planned, dtype.itemsize)
    if batch[2] > 32:  # as if all rows but one were copied at the last token
        assert measured - cache <= predicted <= 1.3 * (measured - cache)
    else:
        assert predicted == pytest.approx(measured - cache, rel=0.15)
    assert cache + predicted == pytest.approx(measured, rel=0.10)


@pytest.mark.parametrize(
    ("changes", "shape"),
    [
        ({}, (16, 48, 4)),
        ({"num_key_value_heads": 8, "intermediate_size": 64}, (16, 48, 2)),  # the worst case: concatenated caches
        ({"num_key_value_heads": 8}, (16, 12, 60)),
    ],
)
def test_activations_of_prompts_that_are_read_in_parts(
    changes: dict[str, Any], shape: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build("llama", **changes)
    rows, prompt, answer = shape
    monkeypatch.setitem(READ_TOKENS, "cpu", 2 * prompt)
    facts = facts_of(model)
    whole = Batch(rows=rows, prompt_tokens=prompt, answer_tokens=answer)
    planned = whole.model_copy(update={"read_tokens": 2 * prompt})
    assert planned.rows_read == 2
    measured = measured_peak(model, planned)
    assert cache_bytes(facts, planned, 4) + activation_bytes(facts, planned, 4) == pytest.approx(measured, rel=0.15)
    if answer < 10:
        assert activation_bytes(facts, planned, 4) < 0.5 * activation_bytes(facts, whole, 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("mode", "edits", "wide"),
    [("full", "outputs", 384), ("full", "outputs", 64), ("none", "outputs", 64), ("column", "columns", 512)],
)
def test_activations_of_an_edited_model(mode: RowNormalization, edits: Edits, wide: int, dtype: torch.dtype) -> None:
    model = build("llama", dtype, intermediate_size=wide)
    facts, planned = facts_of(model), Batch(rows=8, prompt_tokens=48, answer_tokens=4)
    kernel = KernelParameters(max_weight=1.0, max_weight_position=1.0, min_weight=0.5, min_weight_distance=5.0)
    edit = EditParameters(direction_index=None, kernels={"attention": kernel, "mlp": kernel})
    directions = torch.nn.functional.normalize(torch.randn(3, 128), dim=-1)
    with Intervention(model, discover(model), Basis.single(directions), mode) as intervention:
        rows = RowTrials(torch.zeros(8, dtype=torch.long), intervention.activate([edit]))
        measured = measured_peak(model, planned, rows)
    cache = cache_bytes(facts, planned, dtype.itemsize)
    predicted = activation_bytes(facts, planned, dtype.itemsize, edits=edits)
    assert predicted == pytest.approx(measured - cache, rel=0.15)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_weights_are_exact(family: str, tied: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    model = build(family, torch.float32, tie_word_embeddings=tied)
    model.save_pretrained(tmp_path)
    tensors = {}
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        for name in file.keys():  # noqa: SIM118 - the file is no mapping
            view = file.get_slice(name)
            tensors[name] = (view.get_dtype(), tuple(view.get_shape()))
    facts = model_facts(json.loads((tmp_path / "config.json").read_text()), tensors)
    loaded = model.to(dtype)
    assert facts.tied == tied
    assert facts.parameters == sum(parameter.numel() for parameter in loaded.parameters())
    assert facts.weights_bytes(dtype.itemsize) == sum(p.numel() * p.element_size() for p in loaded.parameters())
    assert facts.largest_tensor == max(parameter.numel() for parameter in loaded.parameters())
    layers = loaded.get_decoder().layers
    assert facts.layer_weights[1].cast == sum(parameter.numel() for parameter in layers[1].parameters())
    linear = [module for layer in layers for module in layer.modules() if isinstance(module, torch.nn.Linear)]
    assert sum(part.quantisable for part in facts.parts) == sum(module.weight.numel() for module in linear)


@pytest.mark.parametrize(
    ("family", "changes"), [("llama", {}), ("qwen3", {"head_dim": 32}), ("mistral", {"sliding_window": 9})]
)
@pytest.mark.parametrize("answer", [1, 2, 15])
def test_the_cache_is_exact(family: str, changes: dict[str, Any], answer: int) -> None:
    model = build(family, **changes)
    facts = facts_of(model)
    cache = DynamicCache(config=model.config)
    tokens = torch.zeros(3, 12, dtype=torch.long)
    with torch.inference_mode():
        for _ in range(answer):
            model(input_ids=tokens, past_key_values=cache, use_cache=True)
            tokens = tokens[:, :1]
    storages = {
        tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes()
        for layer in cache.layers
        for tensor in (layer.keys, layer.values)
        if tensor is not None
    }
    assert cache_bytes(facts, Batch(rows=3, prompt_tokens=12, answer_tokens=answer), 4) == sum(storages.values())


def test_facts_of_other_shapes() -> None:
    config = {
        "model_type": "qwen3_moe",
        "num_hidden_layers": 1,
        "hidden_size": 8,
        "num_attention_heads": 2,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 3,
        "vocab_size": 10,
        "quantization_config": {"quant_method": "compressed-tensors"},
    }
    experts = {
        f"model.layers.0.mlp.experts.{expert}.{name}_proj.weight": ("F8_E4M3", (3, 8))
        for expert in range(4)
        for name in ("gate", "up", "down")
    }
    tensors = {
        **experts,
        "model.embed_tokens.weight": ("BF16", (10, 8)),
        "lm_head.weight": ("BF16", (10, 8)),
        "model.layers.0.self_attn.o_proj.weight": ("BF16", (8, 8)),
        "model.visual.blocks.0.mlp.weight": ("BF16", (5, 5)),
        "model.norm.weight": ("BF16", (8,)),
    }
    facts = model_facts(config, tensors)
    assert (facts.experts, facts.experts_per_token, facts.intermediate) == (4, 2, 3)
    assert facts.quantisation == "compressed-tensors"
    assert facts.layer_weights == (Weights(cast=64, kept=12 * 24, quantisable=64),)
    assert facts.other == Weights(cast=33)
    # Two of four experts, the attention and the head.
    assert facts.active_parameters == 2 * 3 * 24 + 64 + 80
    assert facts.parameters == 12 * 24 + 64 + 80 + 80 + 33
    packed = facts.model_copy(update={"quantisation": "awq"})
    assert packed.parameters == facts.parameters + 12 * 24
    dense = facts.model_copy(update={"experts": None, "experts_per_token": None})
    assert dense.active_parameters == 12 * 24 + 64 + 80
    assert facts.stored_bytes == 12 * 24 + 2 * (80 + 80 + 64 + 25 + 8)
    nested = model_facts({"model_type": "gemma3", "text_config": config}, tensors)
    assert (nested.model_type, nested.layers) == ("gemma3", 1)
    latent = {**config, "kv_lora_rank": 4, "qk_nope_head_dim": 3, "qk_rope_head_dim": 2, "v_head_dim": 4}
    assert (model_facts(latent, tensors).head_dim, model_facts(latent, tensors).value_dim) == (5, 4)
    mixed = {**config, "sliding_window": 7, "layer_types": ["sliding_attention"]}
    assert model_facts(mixed, tensors).sliding == (7,)
    assert scoring_bytes(facts, 2, 2) == 2 * 10 * 14


def test_what_is_no_decoder() -> None:
    with pytest.raises(ImpossibleJobError, match="vocab_size"):
        model_facts({"num_hidden_layers": 2, "hidden_size": 8}, {})
    config = {"num_hidden_layers": 1, "hidden_size": 8, "num_attention_heads": 2, "vocab_size": 3}
    with pytest.raises(ImpossibleJobError, match="F3"):
        model_facts(config, {"x": ("F3", (2,))})
