"""Residuals: the residual stream at the last prompt position, caught by hooks on the layers.

Index 0 is the embeddings, index ℓ + 1 the output of layer ℓ before any final norm.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from job.decoding import left_padded
from job.model import LoadedModel


@contextmanager
def layer_outputs(layers: nn.ModuleList, keep: Callable[[int, Tensor], None]) -> Iterator[None]:
    """Within the block, call keep(index, hidden states [rows, t, d]) for every residual of a forward."""

    def enter(_module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        keep(0, inputs[0] if inputs else named["hidden_states"])

    def leave(index: int) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            keep(index, output if isinstance(output, Tensor) else output[0])

        return hook

    handles = [layers[0].register_forward_pre_hook(enter, with_kwargs=True)]
    handles += [layer.register_forward_hook(leave(i + 1)) for i, layer in enumerate(layers)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.inference_mode()
def extract_residuals(
    loaded: LoadedModel, prompts: Sequence[list[int]], rows: int, advance: Callable[[int], None]
) -> Tensor:
    """Return the last prompt position's residuals, [n, layers + 1, d], float32, on the CPU.

    The LM head is not run, and of every layer only one position is kept.

    Args:
        loaded: The model.
        prompts: Token ids of each prompt.
        rows: Prompts in one forward.
        advance: Told how many prompts have been done.
    """
    count = loaded.architecture.layer_count + 1
    residuals = torch.empty(len(prompts), count, loaded.architecture.width)
    layers = loaded.model.get_submodule(loaded.architecture.layers)
    assert isinstance(layers, nn.ModuleList)
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    for start in range(0, len(order), rows):
        chosen = order[start : start + rows]
        tokens, mask, positions = left_padded([prompts[i] for i in chosen], loaded.device)

        def keep(index: int, hidden: Tensor, chosen: list[int] = chosen) -> None:
            residuals[chosen, index] = hidden[:, -1].to("cpu", torch.float32)

        with layer_outputs(layers, keep):
            loaded.model.get_decoder()(input_ids=tokens, attention_mask=mask, position_ids=positions, use_cache=False)
        advance(len(chosen))
    return residuals
