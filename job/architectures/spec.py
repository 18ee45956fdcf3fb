"""Residual writers of a model, and the norms behind them.

`job.architectures.structure` finds them on a small random twin by function. A family is accepted only if the truth test
(`job.proof.truth_test`) shows on such a twin that ablating a direction from all writers removes it from everything that
the layers add to the stream.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from math import prod
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

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
        offset: Constant added to the stored gain: 1 in Gemma, else 0.
        centred: It subtracts the mean, as LayerNorm does and RMSNorm does not.
        bias: Name of its bias in the state dict, or None.
    """

    module: str
    parameter: str
    offset: float
    centred: bool
    bias: str | None

    def pull_back(self, gain: Tensor, directions: Tensor) -> Tensor:
        """Return directions [..., d] to ablate before this norm for given ones after it, not normalised."""
        pulled: Tensor = (gain.to(directions) + self.offset) * directions
        return pulled - pulled.mean(-1, keepdim=True) if self.centred else pulled


@dataclass(frozen=True)
class ShortConvolution:
    """A causal convolution of every entry by itself between a writer and the residual stream.

    Its kernel is [d, 1, taps], the present position's tap last. Each tap carries another direction into the stream.

    Attributes:
        skips: The input is added to its output.
        taps: Number of positions that it reads.
    """

    module: str
    parameter: str
    skips: bool
    taps: int
    bias: None = None

    def pull_back(self, kernel: Tensor, directions: Tensor) -> Tensor:
        """Return directions [m * taps, d] to ablate before it for given ones [m, d] after it, not normalised."""
        taps = kernel[:, 0].to(directions).flip(1).mT.clone()
        if self.skips:
            taps[0] += 1
        return (directions[:, None] * taps).flatten(0, 1)


@dataclass(frozen=True)
class Writer:
    """A parameter whose product with its input is added to the residual stream.

    Attributes:
        component: "attention" if it mixes positions, else "mlp"; each has its own weight kernel.
        axis: The weight's axis along the stream; a bias has it last.
        kind: "linear"; "experts": several experts' weights in one 3-D parameter; "other": further weights with two
            axes.
        hook: Module whose output is edited instead, "" for its own. Experts may reorder their outputs; then the module
            that sums them is hooked, once for all.
        bias_outside: The bias is added to what the hooked module returns.
    """

    layer: int
    component: Component
    module: str
    parameter: str
    bias: str | None
    axis: int = 0
    kind: Kind = "linear"
    post_norms: tuple[PostNorm | ShortConvolution, ...] = ()
    hook: str = ""
    bias_outside: bool = False

    @property
    def hooked(self) -> str:
        """Name of the module whose output hooks edit."""
        return self.hook or self.module

    @property
    def summed(self) -> bool:
        """Whether hooks see only a sum of its outputs, so that all parts need the same edit."""
        return bool(self.hook) or self.kind in ("experts", "other")

    @property
    def edited(self) -> tuple[str, ...]:
        """Names of the parameters that an edit changes: weight and bias."""
        return (self.parameter, *filter(None, [self.bias]))

    @property
    def tensors(self) -> tuple[str, ...]:
        """Names of the parameters that an edit reads: weight, bias and gains of norms."""
        return (*self.edited, *(norm.parameter for norm in self.post_norms))

    @property
    def span(self) -> int:
        """Number of directions before the writer's norms for each in the stream."""
        return prod(norm.taps for norm in self.post_norms if isinstance(norm, ShortConvolution))

    def matrix(self, weight: Tensor) -> Tensor:
        """Return the weight, or one expert's, with the stream's axis first, [d, i]."""
        return weight.movedim(self._axis, 0)

    def unmatrix(self, matrix: Tensor) -> Tensor:
        """Return a matrix [d, i] with the weight's order of axes."""
        return matrix.movedim(0, self._axis)

    @property
    def _axis(self) -> int:
        return self.axis - (self.kind == "experts")

    def pull_back(self, directions: Tensor, read: Callable[[str], Tensor]) -> Tensor:
        """Return directions before the writer's norms for given ones [m, d] in the stream, [m * span, d], float64.

        They have unit length without norms; `read` returns a parameter by name.
        """
        for norm in reversed(self.post_norms):
            directions = norm.pull_back(read(norm.parameter).detach(), directions.to(torch.float64))
        return directions.to(torch.float64)


@dataclass(frozen=True)
class Architecture:
    """A model's structure.

    Attributes:
        forms: Stored forms of the parameters of edits, by name in the loaded model.
        prefix: Prefix that is missing from names in files without a head.
        stream_norms: Norms that each layer's stream itself passes through, in order; () if in no layer. Directions and
            residuals are then those of the last layer's output, to which norms only scale a stream's entries.
    """

    model_type: str
    layers: str
    layer_count: int
    width: int
    writers: tuple[Writer, ...]
    forms: Mapping[str, Form] = field(default_factory=dict)
    prefix: str = ""
    batching: BatchingSupport = field(default_factory=BatchingSupport)
    stream_norms: tuple[tuple[PostNorm | ShortConvolution, ...], ...] = ()

    def at(self, layer: int, directions: Tensor, read: Callable[[str], Tensor]) -> Tensor:
        """Return unit directions before a layer, [..., d], float64, for given ones in the last layer's output."""
        directions = directions.to(torch.float64)
        for norms in reversed(self.stream_norms[layer:]):
            for norm in reversed(norms):
                directions = normalize(norm.pull_back(read(norm.parameter).detach(), directions), dim=-1)
        return directions

    @property
    def norms(self) -> tuple[str, ...]:
        """Names, within their layers, of norms between writers and the stream."""
        modules = (norm.module.rpartition(".")[2] for writer in self.writers for norm in writer.post_norms)
        return tuple(dict.fromkeys(modules))

    def without_norms(self) -> Architecture:
        """Return the structure without norms."""
        writers = tuple(replace(writer, post_norms=()) for writer in self.writers)
        return replace(self, writers=writers, stream_norms=())


def require_editable(architecture: Architecture) -> None:
    """Raise UnsupportedArchitectureError if a writer cannot be edited or exported yet."""
    for writer in architecture.writers:
        reason = ""
        if writer.kind == "other" and not writer.hook:
            reason = f"{writer.parameter} is neither the weight of a linear layer nor that of experts"
        elif any(norm.bias for norm in writer.post_norms):
            reason = f"the norm between {writer.parameter} and the stream has a bias"
        elif not set(writer.tensors) <= architecture.forms.keys():
            reason = f"the files' tensor for {writer.parameter} is unknown"
        if reason:
            raise UnsupportedArchitectureError(architecture.model_type, f"{reason}, which cannot be edited yet")


def require_modes(architecture: Architecture, mode: RowNormalization, form: ExportFormat) -> None:
    """Refuse norm modes and export formats undefined for experts' weights. Raises ImpossibleJobError.

    Hooks see only the sum of the experts' outputs, so an edit must be the same map for every expert.
    """
    experts = next((writer for writer in architecture.writers if writer.summed and writer.kind != "linear"), None)
    if experts is None:
        return
    if mode != "none":
        raise ImpossibleJobError(
            f"ablation.row_normalization = {mode} is not defined for {experts.parameter}, because each expert has "
            "its own norms",
            remedy="use row_normalization = none",
        )
    if form == "adapter":
        raise ImpossibleJobError(
            f"an adapter cannot hold the edit of {experts.parameter}, which is not the weight of a linear layer",
            remedy="use export_format = merged or directions",
        )
