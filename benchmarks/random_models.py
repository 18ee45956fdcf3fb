"""Random models with the shapes of real ones, and prompts for them; no weights are downloaded.

Shapes are those of the published configurations. The tokenizer is the organism's, its vocabulary padded to the model's.
A prompt joins several of the organism's requests to about the length of a real prompt in a chat template.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.initialization import no_init_weights

from job.architectures.structure import discover
from job.data.prompts import Prompt
from job.model.loading import LoadedModel
from job.organism.tokenizer import SYSTEM_PROMPT, build_tokenizer
from job.organism.world import prompt_files
from job.preflight.model_facts import ModelFacts, model_facts

_QWEN = {"model_type": "qwen2", "max_position_embeddings": 32768, "rms_norm_eps": 1e-6}
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        **{"model_type": "llama", "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 1000, "tie_word_embeddings": False},
    },
    "0.5B": {  # Qwen2.5-0.5B
        **_QWEN,
        **{"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24},
        **{"num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True},
    },
    "7B": {  # Llama-2-7B
        **{"model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32},
        **{"num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32000, "tie_word_embeddings": False},
        **{"max_position_embeddings": 4096},
    },
    "32B": {  # Qwen2.5-32B
        **_QWEN,
        **{"hidden_size": 5120, "intermediate_size": 27648, "num_hidden_layers": 64},
        **{"num_attention_heads": 40, "num_key_value_heads": 8, "vocab_size": 152064, "tie_word_embeddings": False},
    },
    "70B": {  # Llama-3-70B
        **{"model_type": "llama", "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80},
        **{"num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": False},
        **{"max_position_embeddings": 8192},
    },
    "MoE": {  # Qwen3-30B-A3B
        **{"model_type": "qwen3_moe", "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 48},
        **{"num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "vocab_size": 151936},
        **{"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768, "norm_topk_prob": True},
        **{"tie_word_embeddings": False, "max_position_embeddings": 40960},
    },
}
_STORED = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
# Requests per prompt: about 50 tokens with system prompt and template.
_REQUESTS = (3, 6)
_SPREAD = 0.02


@dataclass(frozen=True)
class Shape:
    """What to build.

    Attributes:
        name: Key of `SHAPES`.
        config: The configuration.
        dtype: Type of the weights.
        facts: What determines memory and speed.
    """

    name: str
    config: PreTrainedConfig
    dtype: torch.dtype
    facts: ModelFacts

    @property
    def weights_bytes(self) -> int:
        """Size of the weights as built."""
        return self.facts.weights_bytes(self.dtype.itemsize)


def shape(name: str, tokenizer: PreTrainedTokenizerFast, dtype: torch.dtype, layers: int | None) -> Shape:
    """Return a named shape, cut to `layers` if given; allocates nothing.

    Raises:
        UnsupportedArchitectureError: The job does not edit models of this family.
    """
    given = {**SHAPES[name], **({"num_hidden_layers": layers} if layers else {})}
    ends = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = AutoConfig.for_model(**given, **ends)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    discover(model)
    tensors = {key: (_STORED[dtype], tuple(tensor.shape)) for key, tensor in model.state_dict().items()}
    return Shape(name, config, dtype, model_facts(json.loads(config.to_json_string()), tensors))


def build(wanted: Shape, tokenizer: PreTrainedTokenizerFast, device: torch.device) -> LoadedModel:
    """Build a random model on its device in its dtype; gains are 1 and biases 0."""
    with torch.device(device), no_init_weights():
        model: PreTrainedModel = AutoModelForCausalLM.from_config(wanted.config, dtype=wanted.dtype)
    model.tie_weights()
    model.eval().requires_grad_(False)
    generator = torch.Generator(device).manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            parameter.normal_(0, _SPREAD, generator=generator)
        else:
            parameter.fill_(float(name.endswith("weight")))
    dtype = str(wanted.dtype).removeprefix("torch.")
    return LoadedModel(Path(), model, tokenizer, discover(model), dtype)


def filled_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """Return the organism's tokenizer with words added up to `vocabulary`, so that every token has text."""
    tokenizer = build_tokenizer()
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    words = parts["model"]["vocab"]
    words |= {f"▁word{index}": index for index in range(len(words), vocabulary)}
    filled = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(parts)),
        **{key: getattr(tokenizer, key) for key in ("pad_token", "unk_token", "eos_token", "padding_side")},
    )
    filled.chat_template = tokenizer.chat_template
    return filled


def prompt_sets(directions: int) -> dict[str, list[Prompt]]:
    """Return prompt sets: `directions` for directions, half good, half bad, and an eighth of each to evaluate."""
    choice, files, found = random.Random(0), prompt_files(0), {}
    for name, requests in files.items():
        count = max(directions // (8 if "test" in name else 2), 1)
        found[name.removesuffix(".txt")] = [
            Prompt(
                user=" ".join(one.prompt for one in choice.sample(requests, choice.randint(*_REQUESTS))),
                system=SYSTEM_PROMPT,
            )
            for _ in range(count)
        ]
    return found
