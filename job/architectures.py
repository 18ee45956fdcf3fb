"""Which modules of a model write into the residual stream.

Names propose, numbers decide: a family is accepted only if the truth test (`job.truth`) shows, on a
small twin of it, that projecting the output of the writers found here removes a direction from
everything that its layers add to the stream.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from job.errors import ImpossibleJobError
from job.records import Component

# Where decoder layers keep the projections that write into the stream, by component.
WRITER_NAMES: dict[Component, tuple[str, ...]] = {
    "attention": ("self_attn.o_proj",),
    "mlp": ("mlp.down_proj",),
}


class UnsupportedArchitectureError(ImpossibleJobError):
    """The model's family cannot be edited completely, so it is not edited at all."""

    def __init__(self, model_type: str, reason: str) -> None:
        super().__init__(
            f"models of type {model_type!r} are not supported: {reason}",
            remedy="choose a model of a supported family (`abliterate inspect MODEL` tells)",
        )
        self.reason = reason


@dataclass(frozen=True)
class Writer:
    """A module whose output is added to the residual stream.

    Attributes:
        layer: Index of its layer.
        component: What kind of module it is; each kind has a weight kernel of its own.
        module: Its name in the model.
        parameter: Name of its weight in the model's state dict.
        bias: Name of its bias in the state dict, None if it has none.
        axis: Axis of the weight that runs over the residual stream.
    """

    layer: int
    component: Component
    module: str
    parameter: str
    bias: str | None
    axis: int = 0


@dataclass(frozen=True)
class Architecture:
    """What the job needs to know of a model's structure.

    Attributes:
        model_type: The family's name in transformers.
        layers: Name of the list of decoder layers in the model.
        layer_count: Number of decoder layers.
        width: Size of the residual stream.
        writers: All residual writers, layer by layer.
    """

    model_type: str
    layers: str
    layer_count: int
    width: int
    writers: tuple[Writer, ...]


def discover(model: PreTrainedModel) -> Architecture:
    """Return a model's structure.

    Raises:
        UnsupportedArchitectureError: Its layers or their residual writers cannot be told.
    """
    model_type = str(model.config.model_type)
    decoder = model.get_decoder()
    name = next((name for name, module in model.named_modules() if module is decoder), "")
    layers = getattr(decoder, "layers", None)
    if not isinstance(layers, nn.ModuleList) or not len(layers):
        raise UnsupportedArchitectureError(model_type, "its decoder has no list of layers")
    prefix = f"{name}.layers" if name else "layers"
    width = int(model.config.get_text_config().hidden_size)
    writers = []
    for index, layer in enumerate(layers):
        for component, names in WRITER_NAMES.items():
            found = _only_match(model_type, index, layer, component, names)
            module = layer.get_submodule(found)
            if not isinstance(module, nn.Linear) or module.out_features != width:
                raise UnsupportedArchitectureError(
                    model_type, f"{found} of layer {index} is not a linear map onto the residual stream"
                )
            path = f"{prefix}.{index}.{found}"
            bias = f"{path}.bias" if module.bias is not None else None
            writers.append(Writer(index, component, path, f"{path}.weight", bias))
    return Architecture(model_type, prefix, len(layers), width, tuple(writers))


def _only_match(model_type: str, index: int, layer: nn.Module, component: Component, names: tuple[str, ...]) -> str:
    present = {name for name, _ in layer.named_modules()}
    found = [name for name in names if name in present]
    if len(found) != 1:
        raise UnsupportedArchitectureError(
            model_type,
            f"layer {index} has {len(found)} known {component} outputs where one is expected",
        )
    return found[0]
