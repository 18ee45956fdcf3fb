"""Attention on the loaded model: kernels that must not be used, and padding that must not change results."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from job.generation.batching import BatchingSupport
from job.generation.finite import named, rows_not_finite
from job.generation.forward import first_logits, input_device

# Padding of the shorter probe, in tokens: beyond the blocks of 64 or 128 keys that GPU kernels mask as a whole. A CPU
# has no such kernels, and takes seconds for a token of a large model.
_PADDING = {"cpu": 16}
_GPU_PADDING = 192
# Logits' differences by rounding, root mean square in standard deviations: units of the dtype's precision, and the
# least. A batch of another shape may take another kernel, so its rounding is measured where these do not suffice.
_ROUNDING, _LEAST, _TIMES_MEASURED = 16, 1e-3, 4


def disable_cudnn_attention() -> None:
    """Keep cuDNN's attention off in this process: it builds a plan for every shape.

    Public reports say 23 to 440 ms a plan, and a decoding step has a new shape each time (docs/decisions/0023).
    """
    torch.backends.cuda.enable_cudnn_sdp(False)


def probe_prompts(model: PreTrainedModel, prompt: list[int]) -> list[list[int]]:
    """Return a prompt, and its tokens repeated so that a batch of both has padding, within the model's positions."""
    length = len(prompt) + _PADDING.get(input_device(model).type, _GPU_PADDING)
    positions = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    length = min(length, positions or length)
    return [prompt, (prompt * -(-length // len(prompt)))[:length]] if length > len(prompt) else [prompt]


def proven_batching(
    model: PreTrainedModel,
    batching: BatchingSupport,
    prompts: Sequence[list[int]],
    alone: Tensor,
    report: Callable[[str], None],
) -> BatchingSupport:
    """Return batching under which a padded batch gives the logits of each prompt alone, on this device and dtype.

    A query position of padding may attend to no key. Some kernels return NaN there, which reaches all positions of the
    row by way of masked values (reported for B200 in float16 with torch 2.13). Such positions are then made to attend
    to all keys. Where that does not suffice, a forward holds prompts of one length only.

    Args:
        model: The loaded model.
        batching: What its family supports.
        prompts: Token ids of prompts of different lengths.
        alone: Logits of each prompt alone, [prompts, vocabulary], finite.
        report: Receives a line about what was changed.
    """
    if not batching.padded:
        return batching
    fault = _padding_fault(model, prompts, alone)
    if fault is None:
        return batching
    if _let_padding_attend(model) and _padding_fault(model, prompts, alone) is None:
        report(f"padded prompts gave {fault}: padding attends to all tokens now, and they are right")
        return batching
    report(f"warning: padded prompts give {fault}: a forward holds prompts of one length only, which is slower")
    return replace(batching, padded=False, shared=False)


def _padding_fault(model: PreTrainedModel, prompts: Sequence[list[int]], alone: Tensor) -> str | None:
    """Return what is wrong with the logits of a padded batch, None if rounding explains it."""
    padded = first_logits(model, prompts)
    if rows := rows_not_finite(padded):
        return f"logits that are not finite in rows {named(rows)} of {len(prompts)}"
    apart = _logit_distance(padded, alone)
    dtype = model.dtype if model.dtype.is_floating_point else torch.float16
    if apart <= max(_LEAST, _ROUNDING * torch.finfo(dtype).eps):
        return None
    copies = torch.cat([first_logits(model, [prompt] * len(prompts))[:1] for prompt in prompts])
    if apart <= _TIMES_MEASURED * _logit_distance(copies, alone):
        return None
    return f"logits {apart:.2g} standard deviations from those of each prompt alone"


def _logit_distance(logits: Tensor, others: Tensor) -> float:
    """Return the largest root mean square difference of a row of logits, in standard deviations."""
    logits, others = logits.double(), others.double()  # squares of float32 may be infinite
    spread = others.std(-1).clamp_min(torch.finfo(torch.float64).tiny)
    return float(((logits - others).square().mean(-1).sqrt() / spread).max())


def _let_padding_attend(model: PreTrainedModel) -> bool:
    """Have query positions without any key attend to all; return whether transformers makes this model's masks."""
    implementation = model.config._attn_implementation
    if implementation not in ALL_MASK_ATTENTION_FUNCTIONS:
        return False
    make = ALL_MASK_ATTENTION_FUNCTIONS[implementation]
    if not isinstance(make, _FilledMask):
        ALL_MASK_ATTENTION_FUNCTIONS.register(implementation, _FilledMask(make))
    return True


@dataclass(frozen=True)
class _FilledMask:
    """Makes masks [rows, heads, queries, keys] in which queries without any key attend to all."""

    make: Callable[..., Any]

    def __call__(self, *args: Any, **options: Any) -> Any:
        mask = self.make(*args, **options)
        # A single query is a row's last token, which has its own key; flash and flex attention have other masks.
        if not isinstance(mask, Tensor) or mask.dim() != 4 or mask.shape[2] == 1:
            return mask
        empty = ~(mask if mask.dtype == torch.bool else mask == 0).any(-1, keepdim=True)
        return mask | empty if mask.dtype == torch.bool else mask.masked_fill(empty, 0)
