"""The output head's inputs, in a layout that torch multiplies fast."""

from __future__ import annotations

from torch import Tensor, nn
from transformers import PreTrainedModel


def make_head_inputs_contiguous(model: PreTrainedModel) -> None:
    """Let a model's head read contiguous inputs, whatever positions are kept.

    transformers cuts the last positions out of all hidden states. torch multiplies such a view, [n, 1, d], row by row
    with an expanded weight, [n, d, vocabulary]; on a CPU in bfloat16 it even copies that (docs/lab-notes/decoding.md).
    """
    head = model.get_output_embeddings()
    if head is not None:
        head.register_forward_pre_hook(_contiguous)


def _contiguous(_module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(one.contiguous() for one in inputs)
