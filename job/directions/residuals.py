"""Residual stream at the last prompt position, read by hooks on the layers.

Index 0 is the embeddings, index ℓ + 1 the output of layer ℓ before any final norm. Of several streams the mean is read.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from job.architectures.discovery import decoder_of
from job.edits.hooks import ActiveEdits
from job.generation.forward import left_padded
from job.model.loading import LoadedModel
from job.model.placement import read_parameter
from job.storage.atomic import ensure_folder, write_atomically


@contextmanager
def layer_outputs(layers: nn.ModuleList, keep: Callable[[int, Tensor], None]) -> Iterator[None]:
    """Within the block, call keep(index, hidden states) for every residual, [rows, t, d] or [rows, t, streams, d]."""

    def keep_embeddings(_module: nn.Module, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        keep(0, inputs[0] if inputs else kwargs["hidden_states"])

    def keep_output_of(index: int) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            keep(index, output if isinstance(output, Tensor) else output[0])

        return hook

    handles = [layers[0].register_forward_pre_hook(keep_embeddings, with_kwargs=True)]
    handles += [layer.register_forward_hook(keep_output_of(i + 1)) for i, layer in enumerate(layers)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def batches(lengths: Sequence[int], rows: int, tokens: int, *, padded: bool = True) -> Iterator[list[int]]:
    """Yield prompt indices per forward, shortest first, within a limit of rows and padded tokens.

    A prompt above the token limit gets its own forward. Without padding, a forward holds one length only.
    """
    chosen: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        full = len(chosen) == rows or (len(chosen) + 1) * lengths[index] > tokens
        if chosen and (full or not (padded or lengths[chosen[0]] == lengths[index])):
            yield chosen
            chosen = []
        chosen.append(index)
    if chosen:
        yield chosen


@torch.inference_mode()
def extract_residuals(
    loaded: LoadedModel,
    prompts: Sequence[list[int]],
    rows: int,
    advance: Callable[[int], None],
    *,
    tokens: int | None = None,
    edits: ActiveEdits | None = None,
) -> Tensor:
    """Return residuals at the last prompt position, [n, layers + 1, d], float32, on the CPU.

    The LM head does not run. `advance` is called with the number of prompts done; `tokens` limits a forward's padded
    tokens; edit 0 of `edits` is applied to all rows.
    """
    count = loaded.architecture.layer_count + 1
    residuals = torch.empty(len(prompts), count, loaded.architecture.width)
    layers = loaded.model.get_submodule(loaded.architecture.layers)
    assert isinstance(layers, nn.ModuleList)
    lengths, scales = [len(prompt) for prompt in prompts], _scales(loaded)
    token_limit, padded = (
        tokens if tokens is not None else rows * max(lengths, default=0),
        loaded.architecture.batching.padded,
    )
    for chosen in batches(lengths, rows, token_limit, padded=padded):
        ids, mask, positions = left_padded([prompts[i] for i in chosen], loaded.device)
        edited = nullcontext() if edits is None else edits.all_rows(len(chosen), loaded.device)

        def keep(index: int, hidden: Tensor, chosen: list[int] = chosen) -> None:
            last = hidden[:, -1].to("cpu", torch.float32)
            residuals[chosen, index] = scales[index] * (last.mean(1) if last.ndim == 3 else last)

        with edited, layer_outputs(layers, keep):
            decoder_of(loaded.model)(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False)
        advance(len(chosen))
    return residuals


def _scales(loaded: LoadedModel) -> Tensor:
    """Return what scales residuals to the last layer's output, if norms scale the stream, [layers + 1, d], float32."""
    architecture, read = loaded.architecture, partial(read_parameter, loaded.model)
    ones = torch.ones(architecture.width, dtype=torch.float64)
    if not architecture.stream_norms:
        return ones.float().expand(architecture.layer_count + 1, -1)
    gains = [architecture.at(layer, ones, read) for layer in range(architecture.layer_count + 1)]
    return (torch.stack(gains) * math.sqrt(architecture.width)).float()


@dataclass(frozen=True)
class ResidualsTask:
    """Prompts (token ids) of one forward, whose residuals another process may extract."""

    prompts: tuple[tuple[int, ...], ...]

    def extract(self, model: LoadedModel) -> Tensor:
        """Return the residuals, [n, layers + 1, d], float32, on the CPU."""
        return extract_residuals(model, [list(prompt) for prompt in self.prompts], len(self.prompts), lambda _: None)


def digest(value: Any) -> str:
    """Return a hash of a JSON value, used as a cache key."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def write_tensors(file: Path, key: str, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors atomically under a cache key. Raises MachineError if the file cannot be written."""
    ensure_folder(file.parent)
    contents = {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}
    # A single entry, since safetensors orders several arbitrarily and equal contents must give equal bytes.
    write_atomically(file, save(contents, metadata={"seal": _seal(key, contents)}))


def read_tensors(file: Path, key: str) -> dict[str, Tensor] | None:
    """Read the tensors cached under a key; None if missing, stale or damaged."""
    try:
        with safe_open(file, framework="pt") as stored:
            seal = (stored.metadata() or {}).get("seal", "")
            if not seal.startswith(key):
                return None
            contents = {name: stored.get_tensor(name) for name in sorted(stored.keys())}
    except (OSError, SafetensorError):
        return None
    return contents if seal == _seal(key, contents) else None


def _seal(key: str, contents: Mapping[str, Tensor]) -> str:
    hasher = hashlib.sha256()
    for name in sorted(contents):
        tensor = contents[name]
        hasher.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        buffer: Any = tensor.flatten().view(torch.uint8).numpy()  # shares the memory
        hasher.update(buffer)
    return f"{key} {hasher.hexdigest()}"
