"""Facts for a model's memory and speed, from its configuration and file headers."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from job.errors import ImpossibleJobError, QuantisedSourceError
from job.model.quantization import method_of, plain_tensors, quantisation_of
from job.model.weight_files import Headers
from job.records import Record

_BYTES: dict[str, float] = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E8M0", "I8", "U8", "BOOL"), 1),
    "F4": 0.5,
}
# Types that loading casts to the one type the model is loaded in; all others stay as they are stored.
_CAST = frozenset({"F64", "F32", "F16", "BF16"})
_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.")
_EMBEDDING = re.compile(
    r"(?:^|\.)(?:embed_tokens|wte|word_embeddings|embed_in|embeddings|tok_embeddings|input_embedding|w)\.weight$"
)
_HEAD = re.compile(r"(?:^|\.)(?:lm_head|embed_out)\.weight$")
_OTHER_NAMES = {
    "num_hidden_layers": ("n_layer", "n_layers", "num_layers"),
    "hidden_size": ("n_embd", "d_model"),
    "num_attention_heads": ("n_head", "n_heads", "num_heads"),
    "intermediate_size": ("n_inner", "ffn_dim", "dff", "dim_ff", "ffn_hidden_size"),
}
_LISTS_OF_LAYERS = ("layer_types", "layers_block_type")
_HEAD_SIZE = 64
_NOT_TEXT = re.compile(r"(?:^|\.)(?:visual|vision\w*|audio\w*|multi_modal_projector|mm_projector)\.")
# Ways of quantising files that put two weights into a byte.
_FOUR_BIT = frozenset({"awq", "gptq", "mxfp4", "bitsandbytes"})
# bitsandbytes' nf4: half a byte a weight and a float32 scale for each block of 64.
NF4_BYTES = 0.5 + 4 / 64


class Weights(Record):
    """Weights of one part of the model.

    Attributes:
        cast: Weights that loading casts to the loaded type.
        kept: Bytes of weights kept as stored.
        quantisable: Cast weights that 4-bit quantisation replaces: matrices of linear maps.
    """

    cast: int = 0
    kept: int = 0
    quantisable: int = 0

    def bytes(self, dtype_bytes: int, *, quantised: bool = False) -> int:
        """Return their bytes when loaded, optionally 4-bit quantised."""
        small = self.quantisable if quantised else 0
        return (self.cast - small) * dtype_bytes + self.kept + math.ceil(small * NF4_BYTES)


class ModelFacts(Record):
    """Facts for a model's memory and speed.

    Attributes:
        value_dim: Width of a value head.
        intermediate: Width of the MLP, or of one expert.
        sliding: Attention window of each layer in tokens, None for full attention.
        layer_weights: Each layer's weights.
        head: The head's own weights, none if tied.
        other: Other weights: final norm, other modalities' towers.
        quantisation: Quantisation of the files, e.g. "fp8"; None for plain weights.
        largest_tensor: Weights of the largest tensor.
        stored_bytes: Size of all tensors, dequantised as in an export.
    """

    model_type: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    intermediate: int
    vocab: int
    tied: bool
    experts: int | None = None
    experts_per_token: int | None = None
    query_norm: bool = False
    sliding: tuple[int | None, ...]
    embedding: Weights
    layer_weights: tuple[Weights, ...]
    head: Weights = Weights()
    other: Weights = Weights()
    quantisation: str | None = None
    largest_tensor: int
    stored_bytes: int

    @property
    def parts(self) -> tuple[Weights, ...]:
        """All weights, part by part."""
        return (self.embedding, *self.layer_weights, self.head, self.other)

    @property
    def parameters(self) -> int:
        """Number of weights; estimated from bytes for quantised files."""
        return sum(self._count(part) for part in self.parts)

    @property
    def active_parameters(self) -> int:
        """Number of weights multiplied with a token."""
        total = sum(self._count(part) for part in self.layer_weights) + self._count(
            self.head if self.head.cast else self.embedding
        )
        if self.experts and self.experts_per_token:
            # Three matrices an expert; those a token does not pass through are idle.
            idle = self.layers * (self.experts - self.experts_per_token) * 3 * self.hidden * self.intermediate
            total = max(total - idle, 0)
        return total

    def _count(self, part: Weights) -> int:
        # A byte holds one weight (fp8, int8) or two (all others in use).
        return part.cast + part.kept * (2 if self.quantisation in _FOUR_BIT else 1)

    def weights_bytes(self, dtype_bytes: int, *, quantised: bool = False) -> int:
        """Return all weights' bytes when loaded."""
        return sum(part.bytes(dtype_bytes, quantised=quantised) for part in self.parts)


# Long: one fact a line.
def model_facts(config: Mapping[str, Any], tensors: Headers) -> ModelFacts:
    """Return a model's facts from config.json and the tensors' types and shapes. Raises ImpossibleJobError."""
    text = _with_usual_names({**config, **config.get("text_config", {})})
    method = method_of(config, tensors)
    tensors = undone(config, tensors)
    layers, hidden, vocab, heads = _dimensions(text)
    # A tied head that the files hold nevertheless takes no memory of its own.
    tied = bool(text.get("tie_word_embeddings", False)) or not any(_HEAD.search(name) for name in tensors)
    groups = _grouped(tensors, layers, tied)
    head_dim, value_dim = _head_dims(text, hidden // heads)
    experts = text.get("num_local_experts") or text.get("num_experts") or text.get("n_routed_experts")
    width = text.get("moe_intermediate_size") if experts else None
    return ModelFacts(
        model_type=str(config.get("model_type", "unknown")),
        layers=layers,
        hidden=hidden,
        heads=heads,
        # Latent attention (DeepSeek) caches keys and values of every head.
        kv_heads=heads if text.get("kv_lora_rank") else int(text.get("num_key_value_heads") or heads),
        head_dim=head_dim,
        value_dim=value_dim,
        intermediate=int(width or text.get("intermediate_size") or 4 * hidden),
        vocab=vocab,
        tied=tied,
        experts=int(experts) if experts else None,
        experts_per_token=int(text.get("num_experts_per_tok") or 1) if experts else None,
        query_norm=any(name.endswith(".q_norm.weight") for name in tensors),
        sliding=_windows(text, layers),
        embedding=groups["embedding"],
        layer_weights=tuple(groups[str(index)] for index in range(layers)),
        head=groups["head"],
        other=groups["other"],
        quantisation=method,
        largest_tensor=max((math.prod(shape) for _, shape in tensors.values()), default=0),
        stored_bytes=sum(math.ceil(math.prod(shape) * _size(kind)) for kind, shape in tensors.values()),
    )


def _with_usual_names(text: Mapping[str, Any]) -> dict[str, Any]:
    """Add the usual names for a family's own configuration keys."""
    found = dict(text)
    for usual, others in _OTHER_NAMES.items():
        named = next((text[name] for name in others if text.get(name) is not None), None)
        if found.get(usual) is None and named is not None:
            found[usual] = named
    kinds = next((text[name] for name in _LISTS_OF_LAYERS if isinstance(text.get(name), list)), None)
    if found.get("num_hidden_layers") is None and kinds is not None:
        found["num_hidden_layers"] = len(kinds)
    return found


def undone(config: Mapping[str, Any], tensors: Headers) -> Headers:
    """Return the tensors dequantised, as loaded and exported, where possible."""
    try:
        quantisation = quantisation_of(config, tensors)
    except QuantisedSourceError:
        return tensors  # the model is refused for it, by the check of its architecture
    if quantisation is None:
        return tensors
    return {plain.name: (plain.dtype, plain.shape) for plain in plain_tensors(quantisation, tensors)}


def _dimensions(text: Mapping[str, Any]) -> tuple[int, int, int, int]:
    try:
        layers, hidden, vocab = (int(text[key]) for key in ("num_hidden_layers", "hidden_size", "vocab_size"))
        # State spaces have none; what they compute at a time is counted as attention of usual heads would be.
        heads = int(text.get("num_attention_heads") or max(1, hidden // _HEAD_SIZE))
    except (KeyError, TypeError, ValueError) as error:
        raise ImpossibleJobError(
            f"config.json does not describe a decoder: {error} is missing or not a number",
            remedy="choose a causal language model in Hugging Face format",
        ) from error
    return layers, hidden, vocab, heads


def _head_dims(text: Mapping[str, Any], default: int) -> tuple[int, int]:
    if text.get("kv_lora_rank"):
        key = int(text["qk_nope_head_dim"]) + int(text["qk_rope_head_dim"])
        return key, int(text.get("v_head_dim") or key)
    width = int(text.get("head_dim") or default)
    return width, width


def _windows(text: Mapping[str, Any], layers: int) -> tuple[int | None, ...]:
    """Return each layer's attention window; without a list of layer types, all or none slide."""
    window = text.get("sliding_window")
    kinds = text.get("layer_types")
    # Qwen2 and its kin write a window down even where they do not use it.
    if not window or text.get("use_sliding_window") is False:
        return (None,) * layers
    if kinds is None:
        return (int(window),) * layers
    return tuple(int(window) if kind == "sliding_attention" else None for kind in kinds)


def _size(kind: str) -> float:
    try:
        return _BYTES[kind]
    except KeyError:
        raise ImpossibleJobError(
            f"the model's files hold tensors of the unknown type {kind}", remedy="choose another copy of the model"
        ) from None


def _grouped(tensors: Headers, layers: int, tied: bool) -> dict[str, Weights]:
    """Return the weights of the parts "embedding", "head", "other" and of each layer by number."""
    names = ["embedding", "head", "other", *map(str, range(layers))]
    gathered: dict[str, list[tuple[str, str, tuple[int, ...]]]] = {name: [] for name in names}
    for name, (kind, shape) in tensors.items():
        part = _part(name, layers)
        if not (part == "head" and tied):
            gathered[part].append((name, kind, shape))
    return {name: _weights(members) for name, members in gathered.items()}


def _part(name: str, layers: int) -> str:
    if _NOT_TEXT.search(name):
        return "other"
    match = _LAYER.search(name)
    if match is not None:
        # What lies beyond (multi-token prediction) is not loaded by transformers, yet counted to be safe.
        return match[1] if int(match[1]) < layers else "other"
    return "embedding" if _EMBEDDING.search(name) else "head" if _HEAD.search(name) else "other"


def _weights(members: Iterable[tuple[str, str, tuple[int, ...]]]) -> Weights:
    cast = kept = quantisable = 0
    for name, kind, shape in members:
        count = math.prod(shape)
        if kind not in _CAST:
            kept += math.ceil(count * _size(kind))
            continue
        cast += count
        # Experts are fused into one parameter when loaded, which bitsandbytes leaves alone.
        if len(shape) == 2 and _LAYER.search(name) and not _NOT_TEXT.search(name) and ".experts." not in name:
            quantisable += count
    return Weights(cast=cast, kept=kept, quantisable=quantisable)
