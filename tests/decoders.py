"""Tiny configurations of all decoder families that transformers can build, and the job's verdict on each.

`python -m tests.decoders [FAMILY ...]` prints the table; with `--write FILE` it writes docs/architectures.md.
"""

from __future__ import annotations

import argparse
import re
import time
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)
from transformers.utils import logging as transformers_logging

from job.architectures.spec import Architecture
from job.architectures.tiny_model import empty_model, small_config, small_twin
from job.errors import UnsupportedArchitectureError
from job.proof.truth_test import proven, require_supported

# Enough layers to include all kinds.
_DEPTH, _DEEPEST = 6, 12
_ROPE = {"rope_type": "default", "rope_theta": 1e4}
_HYBRID = ["linear_attention", "hybrid"] * 3
# Changes to default configurations, which are made for large models.
_CHANGES: dict[str, dict[str, Any]] = {
    "bloom": {"n_layer": 6},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 3,
        "num_hidden_layers": 6,
        "rope_parameters": dict.fromkeys(("sliding_attention", "full_attention"), _ROPE),
    },
    "dbrx": {
        "n_layers": 4,
        "rope_parameters": _ROPE,
        "attn_config": {"rope_theta": 1e4, "kv_n_heads": 2, "clip_qkv": 8},
    },
    "deepseek_v2": {"num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "chameleon": {"vocabulary_map": {"<image>": 90, "IMGIMGA": 91}},
    "emu3": {"vocabulary_map": {"<image>": 90, "<|extra_200|>": 91, "<|visual token 000000|>": 92}},
    "gemma3n_text": {"num_kv_shared_layers": 2, "num_hidden_layers": 10},
    "gpt_neo": {"num_layers": 6, "attention_types": [[["global", "local"], 3]]},
    "granitemoeshared": {"shared_intermediate_size": 40},
    "granitemoehybrid": {"layer_types": ["mamba", "mamba", "attention"] * 2, "num_hidden_layers": 6},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 3, "num_hidden_layers": 6},
    "ministral": {"head_dim": 16},
    "nemotron": {"num_key_value_heads": 2},
    "zamba": {"layers_block_type": _HYBRID, "num_hidden_layers": 6},
    "zamba2": {"layers_block_type": _HYBRID, "num_hidden_layers": 6},
}


_INTRODUCTION = """# Architectures

Which model families the job edits, and why it refuses the others. The first table lists every decoder-only family of
the causal-LM mapping of transformers 5.23. The second lists the families that also see images and whose defaults make a
small model. Only their text part is edited; the rest is copied unchanged. Written by
`python -m tests.decoders --write docs/architectures.md`.

The job edits a family if all these conditions hold:

- All writers into the residual stream are found: the truth test passes. If a stream enters a layer without a
  direction, it leaves the layer without it.
- Every writer is necessary: the converse of the test passes.
- Hooks can remove a direction from it.
- The job knows how its files store the weights.

The job also tests how the family reads text. Can rows of different lengths share a forward? Does a text's cache give
the same result as reading the text again? `inspect` and `preflight` refuse other families, with the reason given here.
Writers listed for a refused family are proven. A model's own configuration decides: the same family with different
options may have different writers.
"""


def families() -> list[str]:
    """Return all decoder-only families of the causal-LM mapping."""
    found = []
    for family in sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        kind = CONFIG_MAPPING[family]
        # Encoders with a decoder switch, and decoders that belong to an encoder.
        fields = {field for parent in kind.__mro__ for field in vars(parent).get("__annotations__", {})}
        if not {"is_decoder", "add_cross_attention"} <= fields and not getattr(kind, "is_encoder_decoder", False):
            found.append(family)
    return found


def families_with_images() -> list[str]:
    """Return the families of the image-text-to-text mapping that allow small models."""
    found = []
    for family in sorted(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.keys() - MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.keys()):
        try:
            empty_model(tiny_config(family))
        except Exception:  # many kinds: invalid defaults, missing image libraries
            continue
        found.append(family)
    return found


def tiny_config(family: str) -> PretrainedConfig:
    """Return a tiny configuration of a family, with layers of every kind and default switches."""
    kind = CONFIG_MAPPING[family]
    changes = _CHANGES.get(family, {})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = kind(**changes)
        text = config.get_text_config(decoder=True)
        depth = _needed_depth(text)
        name = type(text).attribute_map.get("num_hidden_layers", "num_hidden_layers")
        if text.num_hidden_layers > depth and "num_hidden_layers" not in changes:
            if text is config:
                config = kind(**{**changes, name: depth})
            else:
                part = next(key for key in kind.sub_configs if getattr(config, key) is text)
                config = kind(**{**changes, part: {name: depth}})
        return small_config(config)


def _needed_depth(text: PretrainedConfig) -> int:
    """Return the number of first layers that include every kind of layer."""
    depth, count = _DEPTH, text.num_hidden_layers
    for value in text.to_dict().values():
        if isinstance(value, list | tuple) and len(value) == count:
            depth = max(depth, max(map([str(part) for part in value].index, {str(part) for part in value})) + 1)
    return depth if depth <= _DEEPEST else _DEPTH


@dataclass(frozen=True)
class Verdict:
    """The result for a family.

    Attributes:
        family: Its name.
        built: Whether a tiny model of it can be built.
        architecture: Its structure, None if not proven.
        reason: Why the job refuses it, "" if it does not.
        seconds: Duration of the check.
    """

    family: str
    built: bool
    architecture: Architecture | None
    reason: str
    seconds: float

    @property
    def writers(self) -> str:
        """The writers' names within their layers, with their peculiarities."""
        if self.architecture is None:
            return ""
        counts: Counter[str] = Counter()
        for writer in self.architecture.writers:
            name = writer.parameter.removeprefix(f"{self.architecture.layers}.").partition(".")[2]
            remarks = [f"axis {writer.axis}"] if writer.axis else []
            remarks += ["bias"] if writer.bias else []
            own = f"{self.architecture.layers}.{writer.layer}."
            through = [norm.module.removeprefix(own) for norm in writer.post_norms if norm.module.startswith(own)]
            remarks += [f"through {name}" for name in through]
            counts[re.sub(r"\.weight$", "", name) + (f" ({', '.join(remarks)})" if remarks else "")] += 1
        stream = {norm.module.rpartition(".")[2]: None for norms in self.architecture.stream_norms for norm in norms}
        return ", ".join(counts) + (f"; the stream itself passes through {', '.join(stream)}" if stream else "")


def judge(family: str) -> Verdict:
    """Return the job's verdict on a family's tiny configuration."""
    start = time.monotonic()
    architecture, reason, built = None, "", True
    try:
        config = tiny_config(family)
    except Exception as error:  # transformers raises many kinds
        config, built, reason = None, False, " ".join(str(error).split())
    if config is not None:
        try:
            architecture = proven(config)
            require_supported(config, architecture, small_twin(config))
        except UnsupportedArchitectureError as error:
            reason, built = error.reason, not any(words in error.reason for words in ("be built", "cannot build it"))
    return Verdict(family, built, architecture, reason, time.monotonic() - start)


def page(verdicts: Sequence[Verdict]) -> str:
    lines, images = [_INTRODUCTION], set(families_with_images())
    lines += _table([verdict for verdict in verdicts if verdict.family not in images])
    lines += ["", "## Families that also see images", ""]
    lines += _table([verdict for verdict in verdicts if verdict.family in images])
    return "\n".join(lines) + "\n"


def _table(verdicts: Sequence[Verdict]) -> list[str]:
    lines = ["| family | edited | residual writers, or why not |", "| --- | --- | --- |"]
    for verdict in verdicts:
        said = "yes" if not verdict.reason else "no"
        told = "; ".join(filter(None, (verdict.writers, verdict.reason)))
        lines.append(f"| {verdict.family} | {said} | {told} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("family", nargs="*")
    parser.add_argument("--write", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    transformers_logging.set_verbosity_error()
    verdicts = []
    for family in options.family or [*families(), *families_with_images()]:
        verdict = judge(family)
        verdicts.append(verdict)
        state = "edited" if not verdict.reason else "proven" if verdict.architecture else "refused"
        state = state if verdict.built else "unbuilt"
        print(f"{state:8}{family:24}{verdict.seconds:6.1f} s  {verdict.writers} {verdict.reason}", flush=True)
    counts = Counter(
        "unbuilt" if not v.built else "refused" if v.architecture is None else "proven" if v.reason else "edited"
        for v in verdicts
    )
    print(dict(counts), f"{sum(v.seconds for v in verdicts):.0f} s")
    if options.write:
        options.write.write_text(page(verdicts))


if __name__ == "__main__":
    main()
