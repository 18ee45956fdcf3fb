"""The structure of a model, told from a small random twin of it by what the twin's parameters do."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from job.architectures.discovery import Found, FoundNorm, WriterSearch, decoder_of, find_layers
from job.architectures.spec import Architecture, Kind, PostNorm, Writer
from job.architectures.tensor_names import stored_forms
from job.architectures.tiny_model import empty_model, first_line, twin_of
from job.errors import UnsupportedArchitectureError
from job.generation.greedy import BatchingSupport, manner_of

_NORM_SAMPLES = 16
_NORM_TOLERANCE = 1e-4
# Structures by configuration: a job asks several times.
_KNOWN: dict[str, tuple[Architecture, set[str]]] = {}


def discover(model: PreTrainedModel) -> Architecture:
    """Return a model's structure, found on a small twin of it and compared with it by name.

    Raises:
        UnsupportedArchitectureError: Its layers or their residual writers cannot be told.
    """
    config = model.config
    key = type(model).__name__ + json.dumps(config.to_dict(), sort_keys=True, default=str)
    if key not in _KNOWN:
        _KNOWN[key] = _structure(model)
    found, names = _KNOWN[key]
    others = sorted(names ^ _inside(model, found.layers))
    if others:
        raise UnsupportedArchitectureError(
            found.model_type, f"{others[0]} is not in both the model and the small twin that was looked at"
        )
    return replace(found, width=int(config.get_text_config(decoder=True).hidden_size))


def architecture_of(config: PretrainedConfig) -> Architecture:
    """Return the structure that a model of a configuration has; no weight is made.

    Raises:
        UnsupportedArchitectureError: Its layers or their residual writers cannot be told.
    """
    return discover(empty_model(config))


def _structure(model: PreTrainedModel) -> tuple[Architecture, set[str]]:
    """Return the structure of a model's twin, and the names of what the layers of that one hold."""
    twin = twin_of(model)
    found = structure_of_twin(twin)
    whole = twin_of(model)  # the other one is spoilt
    forms = stored_forms(whole, {name for writer in found.writers for name in writer.tensors})
    found = replace(
        found,
        writers=tuple(_with_hooks(whole, found)),
        forms=forms,
        prefix=whole.base_model_prefix,
        manner=_manner(whole, model),
    )
    return found, _inside(whole, found.layers)


def _manner(twin: PreTrainedModel, model: PreTrainedModel) -> BatchingSupport:
    """Return how a model can be read; its own kind of attention decides, which the twin is given."""
    try:
        twin.set_attn_implementation(model.config._attn_implementation)
        return manner_of(twin)
    except Exception as error:  # whatever the family's own code raises
        raise UnsupportedArchitectureError(
            str(twin.config.model_type), f"its small twin cannot be made to answer ({first_line(error)})"
        ) from error


def _with_hooks(twin: PreTrainedModel, architecture: Architecture) -> Iterator[Writer]:
    """Yield the writers with the modules that hooks edit: those that return one vector for every position."""
    summed = [writer.module for writer in architecture.writers if writer.summed]
    if not summed:
        yield from architecture.writers
        return
    aligned = _aligned(twin, architecture.width)
    hooks = {name for name in (_first_aligned(module, aligned) for module in summed) if name not in summed}
    for writer in architecture.writers:
        inside = [hook for hook in hooks if hook and writer.module.startswith(f"{hook}.")]
        yield replace(writer, hook=min(inside, key=len)) if inside else writer


def _first_aligned(module: str, aligned: set[str]) -> str:
    while module and module not in aligned:
        module = _module(module)
    return module


def _aligned(twin: PreTrainedModel, width: int) -> set[str]:
    """Return the modules that are called once and return one vector of the stream for every row's every position."""
    rows, tokens = 3, 7
    sizes: dict[str, list[int]] = {}

    def look(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            first = output[0] if isinstance(output, tuple) and output else output
            fits = isinstance(first, Tensor) and first.shape[-1:] == (width,)
            sizes.setdefault(name, []).append(first.numel() if fits else 0)

        return hook

    handles = [module.register_forward_hook(look(name)) for name, module in twin.named_modules() if name]
    try:
        with torch.inference_mode():
            decoder_of(twin)(input_ids=torch.arange(3, 3 + rows * tokens).view(rows, tokens), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return {name for name, found in sizes.items() if found == [rows * tokens * width]}


def _inside(model: PreTrainedModel, layers: str) -> set[str]:
    return {name for name, _ in model.named_parameters() if name.startswith(f"{layers}.")}


def structure_of_twin(twin: PreTrainedModel) -> Architecture:
    """Return the structure of a small random model; its parameters are spoilt.

    Raises:
        UnsupportedArchitectureError: Its layers or their residual writers cannot be told.
    """
    try:
        layers = find_layers(twin)
        search = WriterSearch(twin, layers)
        search.run()
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RuntimeError) as error:
        raise UnsupportedArchitectureError(
            str(twin.config.model_type), f"its small twin does not read text alone ({first_line(error)})"
        ) from error
    weights = [found for found in search.writers if not _is_bias(twin, found, search.writers)]
    biases = [found for found in search.writers if found not in weights]
    writers = [_writer(twin, found, search, biases) for found in weights]
    if biases:
        raise UnsupportedArchitectureError(
            str(twin.config.model_type), f"{biases[0].parameter} of layer {biases[0].layer} belongs to no known weight"
        )
    count = sum(1 for _ in twin.get_submodule(layers).children())
    writers.sort(key=lambda writer: (writer.layer, writer.component))
    return Architecture(str(twin.config.model_type), layers, count, search.width, tuple(writers))


def _is_bias(twin: PreTrainedModel, found: Found, others: list[Found]) -> bool:
    """Say whether a parameter is added to the stream as it is: a vector, or one for each of a weight's experts."""
    shape = twin.get_parameter(found.parameter).shape
    same = (twin.get_parameter(o.parameter).ndim for o in others if _module(o.parameter) == _module(found.parameter))
    return len(shape) == 1 or (len(shape) == 2 and 3 in same)


def _writer(twin: PreTrainedModel, found: Found, search: WriterSearch, biases: list[Found]) -> Writer:
    """Return a weight's writer, and take what belongs to it out of the biases."""
    module = _module(found.parameter)
    own = [
        b
        for b in biases
        if (b.layer, b.norm) == (found.layer, found.norm) and f"{module}.".startswith(f"{_module(b.parameter)}.")
    ]
    for bias in own[:1]:
        biases.remove(bias)
    parameter = twin.get_parameter(found.parameter)
    holder = twin.get_submodule(module)
    kind: Kind = "experts" if parameter.ndim == 3 else "other"
    if isinstance(holder, nn.Linear):
        kind = "linear"
    elif isinstance(holder, Conv1D):
        kind = "conv1d"
    return Writer(
        layer=found.layer,
        component="attention" if found.mixes else "mlp",
        module=_module(own[0].parameter) if own else module,
        parameter=found.parameter,
        bias=own[0].parameter if own else None,
        axis=found.axis,
        kind=kind,
        post_norms=_post_norms(twin, found, search, biases),
    )


def _module(parameter: str) -> str:
    return parameter.rpartition(".")[0]


def _post_norms(twin: PreTrainedModel, found: Found, search: WriterSearch, biases: list[Found]) -> tuple[PostNorm, ...]:
    """Return the norms that a writer's output goes through, in that order, and take their biases out of the others."""
    chain: list[PostNorm] = []
    name = found.norm
    while name:
        norm = next(norm for norm in search.norms if norm.module == name)
        bias = next((b.parameter for b in search.writers if _module(b.parameter) == name), None)
        biases[:] = [b for b in biases if b.parameter != bias]
        chain.append(_post_norm(twin, norm, bias))
        name = norm.norm
    return tuple(chain)


def _post_norm(twin: PreTrainedModel, norm: FoundNorm, bias: str | None) -> PostNorm:
    """Return what a norm does, told from what it makes of random inputs.

    Raises:
        UnsupportedArchitectureError: It is neither RMSNorm nor LayerNorm.
    """
    gain = twin.get_parameter(norm.gain).detach()
    added = twin.get_parameter(bias).detach() if bias else torch.zeros_like(gain)
    # Large, so that the epsilon does not count.
    x = 1e3 * torch.randn(_NORM_SAMPLES, len(gain), generator=torch.Generator().manual_seed(0))
    try:
        with torch.no_grad():
            y = twin.get_submodule(norm.module)(x)
    except (TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise UnsupportedArchitectureError(str(twin.config.model_type), f"{norm.module} is no norm ({error})") from None
    for centred in (False, True):
        z = x - x.mean(-1, keepdim=True) if centred else x
        z = z / z.square().mean(-1, keepdim=True).sqrt()
        for offset in (0.0, 1.0):
            if isinstance(y, Tensor) and (y - ((gain + offset) * z + added)).abs().max() < _NORM_TOLERANCE:
                return PostNorm(norm.module, norm.gain, offset, centred, bias)
    raise UnsupportedArchitectureError(
        str(twin.config.model_type),
        f"{norm.module} scales what reaches the stream and is neither RMSNorm nor LayerNorm",
    )
