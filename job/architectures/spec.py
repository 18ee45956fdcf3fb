"""Which parameters of a model write into the residual stream, and through which norms: the values.

`job.architectures.structure` finds them on a small random twin of the model by what they do. A family is accepted only
if the truth test (`job.proof.truth_test`) shows on such a twin that ablating a direction from all of them removes it
from everything that the layers add to the stream.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from job.architectures.tensor_names import Form
from job.errors import ImpossibleJobError, UnsupportedArchitectureError
from job.generation.batching import BatchingSupport
from job.numerics.ablation import RowNormalization
from job.records import Component, ExportFormat

Kind = Literal["linear", "conv1d", "experts", "other"]


@dataclass(frozen=True)
class PostNorm:
    """A norm between a writer and the residual stream.

    Attributes:
        module: Its name in the model.
        parameter: Name of its gain in the state dict.
        offset: What is added to the stored gain before it multiplies: 1 in Gemma, else 0.
        centred: It takes the mean off its input, as LayerNorm does and RMSNorm does not.
        bias: Name of its bias in the state dict, None if it has none.
    """

    module: str
    parameter: str
    offset: float
    centred: bool
    bias: str | None

    def pull_back(self, gain: Tensor, directions: Tensor) -> Tensor:
        """Return what has to be ablated before this norm so that directions are missing after it.

        Args:
            gain: The norm's gain as it is stored, [d].
            directions: Directions after the norm, [..., d].

        Returns:
            Those before it, [..., d], linear in the directions and not of unit length.
        """
        pulled: Tensor = (gain.to(directions) + self.offset) * directions
        return pulled - pulled.mean(-1, keepdim=True) if self.centred else pulled


@dataclass(frozen=True)
class Writer:
    """A parameter whose product with its input is added to the residual stream.

    Attributes:
        layer: Index of its layer.
        component: "attention" if it writes what it read at several positions, "mlp" if at one; each has a weight
            kernel of its own.
        module: Name of the module that holds it.
        parameter: Name of the weight in the model's state dict.
        bias: Name of its bias in the state dict, None if it has none.
        axis: Axis of the weight that runs over the residual stream; that of a bias is its last.
        kind: What the module is; "experts" holds several experts' weights in one 3-D parameter, "other" weights of
            two axes that are no layer's of their own.
        post_norms: The norms between it and the stream, in that order.
        hook: Name of the module whose output hooks edit in its place, "" for its own. Experts' modules may return
            their outputs in an order of their own; what adds them up is hooked then, once for all that it adds up.
    """

    layer: int
    component: Component
    module: str
    parameter: str
    bias: str | None
    axis: int = 0
    kind: Kind = "linear"
    post_norms: tuple[PostNorm, ...] = ()
    hook: str = ""

    @property
    def hooked(self) -> str:
        """Name of the module whose output hooks edit."""
        return self.hook or self.module

    @property
    def summed(self) -> bool:
        """Whether hooks see a sum of its outputs only, so that every part of it has to be edited alike."""
        return bool(self.hook) or self.kind in ("experts", "other")

    @property
    def edited(self) -> tuple[str, ...]:
        """Names of all that an edit of it changes: the weight and the bias."""
        return (self.parameter, *filter(None, [self.bias]))

    @property
    def tensors(self) -> tuple[str, ...]:
        """Names of all that an edit of it reads: the weight, the bias and the gains of norms."""
        return (*self.edited, *(norm.parameter for norm in self.post_norms))

    def matrix(self, weight: Tensor) -> Tensor:
        """Return the weight, or one expert's, with the axis of the stream first, [d, i]."""
        return weight.movedim(self._axis, 0)

    def unmatrix(self, matrix: Tensor) -> Tensor:
        """Return a matrix [d, i] with the weight's own order of axes."""
        return matrix.movedim(0, self._axis)

    @property
    def _axis(self) -> int:
        return self.axis - (self.kind == "experts")

    def pull_back(self, directions: Tensor, read: Callable[[str], Tensor]) -> Tensor:
        """Return what has to be ablated before the writer's norms so that directions are missing in the stream.

        Args:
            directions: Directions of the stream, [m, d].
            read: Returns a parameter of the model by its name.

        Returns:
            Directions before the norms, [m, d], float64; of unit length where there are no norms.
        """
        for norm in reversed(self.post_norms):
            directions = norm.pull_back(read(norm.parameter).detach(), directions.to(torch.float64))
        return directions.to(torch.float64)


@dataclass(frozen=True)
class Architecture:
    """What the job needs to know of a model's structure.

    Attributes:
        model_type: The family's name in transformers.
        layers: Name of the list of decoder layers in the model.
        layer_count: Number of decoder layers.
        width: Size of the residual stream.
        writers: All residual writers, layer by layer.
        forms: How files hold what edits read and change, by name in the loaded model.
        prefix: What files of the model without its head leave out of names.
        batching: How rows can be batched and decoded.
    """

    model_type: str
    layers: str
    layer_count: int
    width: int
    writers: tuple[Writer, ...]
    forms: Mapping[str, Form] = field(default_factory=dict)
    prefix: str = ""
    batching: BatchingSupport = field(default_factory=BatchingSupport)

    @property
    def norms(self) -> tuple[str, ...]:
        """Names, within their layers, of the norms between writers and the stream."""
        modules = (norm.module.rpartition(".")[2] for writer in self.writers for norm in writer.post_norms)
        return tuple(dict.fromkeys(modules))

    def without_norms(self) -> Architecture:
        """Return the structure as if no norm stood between writers and the stream."""
        return replace(self, writers=tuple(replace(writer, post_norms=()) for writer in self.writers))


def require_editable(architecture: Architecture) -> None:
    """Refuse structures that edits or exports do not support yet.

    Raises:
        UnsupportedArchitectureError: A writer cannot be edited.
    """
    for writer in architecture.writers:
        reason = ""
        if writer.kind == "other" and not writer.hook:
            reason = f"{writer.parameter} is neither a linear layer's weight nor experts'"
        elif any(norm.bias for norm in writer.post_norms):
            reason = f"the norm between {writer.parameter} and the stream has a bias"
        elif not set(writer.tensors) <= architecture.forms.keys():
            reason = f"how files hold {writer.parameter} cannot be told"
        if reason:
            raise UnsupportedArchitectureError(architecture.model_type, f"{reason}, which cannot be edited yet")


def require_modes(architecture: Architecture, mode: RowNormalization, form: ExportFormat) -> None:
    """Refuse norm modes and export formats that are not defined for experts' weights.

    Hooks see only the sum of the experts' outputs, so an edit has to be the same map for every expert.

    Raises:
        ImpossibleJobError: The mode or the format is not defined for this structure.
    """
    experts = next((writer for writer in architecture.writers if writer.summed and writer.kind != "linear"), None)
    if experts is None:
        return
    if mode != "none":
        raise ImpossibleJobError(
            f"ablation.row_normalization = {mode} is not defined for {experts.parameter}, where each expert has norms "
            "of its own",
            remedy="use row_normalization = none",
        )
    if form == "adapter":
        raise ImpossibleJobError(
            f"an adapter cannot hold the edit of {experts.parameter}, which is no linear layer's weight",
            remedy="use export_format = merged or directions",
        )
