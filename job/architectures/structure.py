"""The structure of a model, inferred from a small random twin."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from job.architectures.discovery import Found, FoundNorm, WriterSearch, decoder_of, find_layers
from job.architectures.spec import Architecture, Kind, PostNorm, ShortConvolution, Writer
from job.architectures.tensor_names import stored_forms
from job.architectures.tiny_model import empty_model, twin_of
from job.errors import UnsupportedArchitectureError, in_one_line, refusing
from job.generation.batching import BatchingSupport
from job.generation.probing import probe_batching

_SHAPE = 3, 7  # rows and tokens of forwards that find hooks
_NORM_SAMPLES = 16
_NORM_TOLERANCE = 1e-4
# Cached structures and layer parameters by what determines them, since a job needs them repeatedly.
_STRUCTURES: dict[tuple[type, str], tuple[Architecture, set[str]]] = {}


def determined_by(model: PreTrainedModel) -> tuple[type, str]:
    """Return what determines a model's structure: its class and configuration, wherever its files lie.

    So an export has the structure of its base model, while each copy of a model's own code is a class of its own.
    """
    described = {name: value for name, value in model.config.to_dict().items() if name != "_name_or_path"}
    return type(model), json.dumps(described, sort_keys=True, default=str)


def discover(model: PreTrainedModel) -> Architecture:
    """Return a model's structure, found on a small twin. Raises UnsupportedArchitectureError."""
    config = model.config
    key = determined_by(model)
    if key not in _STRUCTURES:
        _STRUCTURES[key] = _structure(model)
    architecture, names = _STRUCTURES[key]
    others = sorted(names ^ _layer_parameters(model, architecture.layers))
    if others:
        raise UnsupportedArchitectureError(
            architecture.model_type, f"{others[0]} is missing from the model or from its small test copy"
        )
    return replace(architecture, width=int(config.get_text_config(decoder=True).hidden_size))


def architecture_of(config: PretrainedConfig) -> Architecture:
    """Return the structure of a configuration's model without weights. Raises UnsupportedArchitectureError."""
    return discover(empty_model(config))


def _structure(model: PreTrainedModel) -> tuple[Architecture, set[str]]:
    architecture = structure_of_twin(twin_of(model))
    twin = twin_of(model)  # the search has destroyed the first twin
    forms = stored_forms(twin, {name for writer in architecture.writers for name in writer.tensors})
    architecture = replace(
        architecture,
        writers=tuple(_with_hooks(twin, architecture)),
        forms=forms,
        prefix=twin.base_model_prefix,
        batching=_batching_support(twin, model),
    )
    return architecture, _layer_parameters(twin, architecture.layers)


def _batching_support(twin: PreTrainedModel, model: PreTrainedModel) -> BatchingSupport:
    """Probe batching on the twin with the model's attention implementation."""
    # The family's own code may raise anything.
    with refusing(str(twin.config.model_type), "its small test copy does not run"):
        twin.set_attn_implementation(model.config._attn_implementation)
        return probe_batching(twin)


def _with_hooks(twin: PreTrainedModel, architecture: Architecture) -> Iterator[Writer]:
    """Yield the writers with modules to hook: those that return one vector per position."""
    writers = [_with_bias_placed(twin, writer) for writer in architecture.writers]
    summed = [writer.module for writer in writers if writer.summed]
    if not summed:
        yield from writers
        return
    aligned = _position_wise_modules(twin, architecture.width)
    hooks = {name for name in (_innermost_around(module, aligned) for module in summed) if name not in summed}
    for writer in writers:
        inside = [hook for hook in hooks if hook and writer.module.startswith(f"{hook}.")]
        yield replace(writer, hook=min(inside, key=len)) if inside else writer


def _with_bias_placed(twin: PreTrainedModel, writer: Writer) -> Writer:
    """Return a writer with its weight's own module if the bias is added outside of the module that holds it."""
    own = _module_of(writer.parameter)
    if writer.bias is None or writer.module == own:
        return writer
    before = _outputs_of(twin, writer.module)
    bias = twin.get_parameter(writer.bias)
    kept = bias.data.clone()
    bias.data.add_(1)
    after = _outputs_of(twin, writer.module)
    bias.data.copy_(kept)
    outside = bool(before) and all(map(torch.equal, before, after))
    return replace(writer, module=own, bias_outside=True) if outside else writer


def _outputs_of(twin: PreTrainedModel, module: str) -> list[Tensor]:
    outputs: list[Tensor] = []

    def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
        outputs.append(output[0] if isinstance(output, tuple) else output)

    handle = twin.get_submodule(module).register_forward_hook(hook)
    try:
        with torch.inference_mode():
            decoder_of(twin)(input_ids=_tokens(), use_cache=False)
    finally:
        handle.remove()
    return outputs


def _tokens() -> Tensor:
    rows, tokens = _SHAPE
    return torch.arange(3, 3 + rows * tokens).view(rows, tokens)


def _innermost_around(module: str, names: set[str]) -> str:
    """Return the innermost of the named modules that is or contains a module, "" if none does."""
    while module and module not in names:
        module = _module_of(module)
    return module


def _position_wise_modules(twin: PreTrainedModel, width: int) -> set[str]:
    """Return the modules called once that return a vector of the stream per position of every row."""
    count = _tokens().numel() * width
    sizes: dict[str, list[int]] = {}

    def measure(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            first = output[0] if isinstance(output, tuple) and output else output
            fits = isinstance(first, Tensor) and first.shape[-1:] == (width,)
            sizes.setdefault(name, []).append(first.numel() if fits else 0)

        return hook

    handles = [module.register_forward_hook(measure(name)) for name, module in twin.named_modules() if name]
    try:
        with torch.inference_mode():
            decoder_of(twin)(input_ids=_tokens(), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return {name for name, outputs in sizes.items() if outputs == [count]}


def _layer_parameters(model: PreTrainedModel, layers: str) -> set[str]:
    return {name for name, _ in model.named_parameters() if name.startswith(f"{layers}.")}


def structure_of_twin(twin: PreTrainedModel) -> Architecture:
    """Return a small random model's structure, destroying its parameters. Raises UnsupportedArchitectureError."""
    try:
        layers = find_layers(twin)
        search = WriterSearch(twin, layers)
        search.run()
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RuntimeError) as error:
        raise UnsupportedArchitectureError(
            str(twin.config.model_type), f"its small test copy does not accept text alone ({in_one_line(error)})"
        ) from error
    weights = [found for found in search.writers if not _is_bias(twin, found, search.writers)]
    biases = [found for found in search.writers if found not in weights]
    writers = [_writer(twin, found, search, biases) for found in weights]
    if biases:
        raise UnsupportedArchitectureError(
            str(twin.config.model_type),
            f"{biases[0].parameter} of layer {biases[0].layer} belongs to none of the weights found",
        )
    count = sum(1 for _ in twin.get_submodule(layers).children())
    writers.sort(key=lambda writer: (writer.layer, writer.component))
    architecture = Architecture(str(twin.config.model_type), layers, count, search.width, tuple(writers))
    if not search.carriers:
        return architecture
    carrying = tuple(_stream_norms(twin, search, f"{layers}.{layer}.") for layer in range(count))
    shifting = (norm for norm in chain.from_iterable(carrying) if norm.bias or getattr(norm, "centred", False))
    shifted = next((norm.module for norm in shifting), None)
    if shifted is not None:
        raise UnsupportedArchitectureError(
            architecture.model_type,
            f"the stream itself passes through {shifted}, whose bias or mean cannot be edited yet",
        )
    through = (replace(w, post_norms=(*w.post_norms, *chain.from_iterable(carrying[w.layer + 1 :]))) for w in writers)
    return replace(architecture, writers=tuple(through), stream_norms=carrying)


def _stream_norms(twin: PreTrainedModel, search: WriterSearch, layer: str) -> tuple[PostNorm | ShortConvolution, ...]:
    """Return the norms that a layer's stream passes through, in order: the search goes backwards."""
    found = [one for one in reversed(search.norms) if one.gain in search.carriers and one.gain.startswith(layer)]
    return tuple(_post_norm(twin, norm, search) for norm in found)


def _is_bias(twin: PreTrainedModel, found: Found, others: list[Found]) -> bool:
    dimensions = twin.get_parameter(found.parameter).ndim
    module = _module_of(found.parameter)
    beside = [twin.get_parameter(other.parameter).ndim for other in others if _module_of(other.parameter) == module]
    return dimensions == 1 or (dimensions == 2 and 3 in beside)


def _writer(twin: PreTrainedModel, found: Found, search: WriterSearch, biases: list[Found]) -> Writer:
    """Return a weight's writer, and remove its bias and its norms' biases from the list."""
    module = _module_of(found.parameter)
    bias = next((one for one in biases if _belongs(one, found)), None)
    if bias is not None:
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
        module=module if bias is None else _module_of(bias.parameter),
        parameter=found.parameter,
        bias=None if bias is None else bias.parameter,
        axis=found.axis,
        kind=kind,
        post_norms=_post_norms(twin, found, search, biases),
    )


def _belongs(bias: Found, weight: Found) -> bool:
    """Return whether a bias is added to a weight's output: same or enclosing module, before the same norm."""
    around = f"{_module_of(weight.parameter)}.".startswith(f"{_module_of(bias.parameter)}.")
    return around and (bias.layer, bias.norm) == (weight.layer, weight.norm)


def _module_of(parameter: str) -> str:
    return parameter.rpartition(".")[0]


def _post_norms(
    twin: PreTrainedModel, found: Found, search: WriterSearch, biases: list[Found]
) -> tuple[PostNorm | ShortConvolution, ...]:
    """Return the norms after a writer in order, and remove their biases from the list."""
    norms: list[PostNorm | ShortConvolution] = []
    name = found.norm
    while name:
        norm = next(norm for norm in search.norms if norm.module == name)
        norms.append(_post_norm(twin, norm, search))
        biases[:] = [one for one in biases if one.parameter != norms[-1].bias]
        name = norm.norm
    return tuple(norms)


def _post_norm(twin: PreTrainedModel, norm: FoundNorm, search: WriterSearch) -> PostNorm | ShortConvolution:
    """Determine a norm's kind from its outputs. Raises UnsupportedArchitectureError for other kinds."""
    if norm.bare:
        return PostNorm(norm.module, norm.gain, 0.0, False, None)
    if twin.get_parameter(norm.gain).ndim > 1:
        return _short_convolution(twin, norm)
    bias = next((one.parameter for one in search.writers if _module_of(one.parameter) == norm.module), None)
    gain = twin.get_parameter(norm.gain).detach()
    added = twin.get_parameter(bias).detach() if bias else torch.zeros_like(gain)
    # Large, so that epsilon is negligible.
    x = 1e3 * torch.randn(_NORM_SAMPLES, len(gain), generator=torch.Generator().manual_seed(0))
    try:
        with torch.no_grad():
            y = twin.get_submodule(norm.module)(x)
    except (TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise UnsupportedArchitectureError(
            str(twin.config.model_type), f"{norm.module} is not a norm ({error})"
        ) from None
    for centred in (False, True):
        z = x - x.mean(-1, keepdim=True) if centred else x
        z = z / z.square().mean(-1, keepdim=True).sqrt()
        for offset in (0.0, 1.0):
            if isinstance(y, Tensor) and (y - ((gain + offset) * z + added)).abs().max() < _NORM_TOLERANCE:
                return PostNorm(norm.module, norm.gain, offset, centred, bias)
    raise UnsupportedArchitectureError(
        str(twin.config.model_type),
        f"{norm.module} scales the input to the stream but is neither RMSNorm nor LayerNorm",
    )


def _short_convolution(twin: PreTrainedModel, norm: FoundNorm) -> ShortConvolution:
    """Determine a convolution's kind from its response to an impulse. Raises UnsupportedArchitectureError."""
    kernel = twin.get_parameter(norm.gain).detach()
    x = torch.zeros(1, kernel.shape[-1], len(kernel))
    x[0, 0] = torch.randn(len(kernel), generator=torch.Generator().manual_seed(0))
    with refusing(str(twin.config.model_type), f"{norm.module} is not a convolution"), torch.no_grad():
        y = twin.get_submodule(norm.module)(x)[0].to(torch.float64)
    for skips in (False, True):
        found = ShortConvolution(norm.module, norm.gain, skips, kernel.shape[-1])
        expected = found.pull_back(kernel, x[0, :1].to(torch.float64))
        scale = (expected * y).sum() / expected.square().sum()
        if y.shape == expected.shape and scale > 0 and (y - scale * expected).norm() < _NORM_TOLERANCE * y.norm():
            return found
    raise UnsupportedArchitectureError(
        str(twin.config.model_type), f"{norm.module} convolves the way to the stream otherwise than known"
    )
