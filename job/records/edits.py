"""Edits as data: strengths by kernel or by layer, and their directions."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from job.numerics.weight_kernel import WeightKernel
from job.records.base import Record

Component = Literal["attention", "mlp"]
COMPONENTS: tuple[Component, ...] = ("attention", "mlp")
# λ of every direction of a layer, for every layer.
LayerStrengths = tuple[tuple[Annotated[float, Field(allow_inf_nan=False)], ...], ...]


class KernelParameters(Record):
    """A component's sampled weight kernel; see `job.numerics.weight_kernel.WeightKernel`."""

    max_weight: float
    max_weight_position: float
    min_weight: float
    min_weight_distance: float


class LearnedDirections(Record):
    """Directions learned by gradient; see `job.numerics.basis.DirectionPath`.

    `sha256` names their file in the run folder; `position` is the place among its stages, interpolated if fractional.
    """

    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    position: float = Field(ge=0, allow_inf_nan=False)


class EditParameters(Record):
    """One edit of the model, as tried by a trial or written by an export.

    Attributes:
        direction_index: Fractional layer whose direction is ablated in every layer; None uses each layer's own.
        kernels: Weight kernel of each component; empty with strengths by layer.
        strengths: For each direction of a layer's basis, its share of the kernel's strength.
        layer_strengths: λ of each component, layer and direction, instead of kernels.
        directions: Learned directions instead of the basis; only with strengths by layer.
    """

    direction_index: float | None
    kernels: dict[Component, KernelParameters]
    strengths: tuple[float, ...] = (1.0,)
    # Omitted if None: edits by kernels keep their former form.
    layer_strengths: dict[Component, LayerStrengths] | None = Field(None, exclude_if=lambda value: value is None)
    directions: LearnedDirections | None = Field(None, exclude_if=lambda value: value is None)

    @model_validator(mode="after")
    def _is_of_one_kind(self) -> Self:
        if self.layer_strengths is None:
            if self.directions is not None:
                raise ValueError("learned directions need layer_strengths")
            return self
        if self.kernels or self.direction_index is not None or self.strengths != (1.0,):
            raise ValueError("layer_strengths replace kernels, strengths and direction_index: give one or the other")
        if self.layer_strengths.keys() != set(COMPONENTS):
            raise ValueError(f"layer_strengths are for {' and '.join(COMPONENTS)}")
        layers = [layer for component in self.layer_strengths.values() for layer in component]
        if len({len(component) for component in self.layer_strengths.values()}) > 1 or len(set(map(len, layers))) != 1:
            raise ValueError("layer_strengths differ in their number of layers or directions")
        return self

    def strengths_by_layer(self, layers: int) -> dict[Component, LayerStrengths]:
        """Return λ of each component, layer and direction, kernels' not yet weighted by the basis.

        Raises ValueError.
        """
        if self.layer_strengths is None:
            kernels = {name: WeightKernel(**dict(kernel)) for name, kernel in self.kernels.items()}
            return {
                name: tuple(
                    tuple(kernel.strength(layer) * share for share in self.strengths) for layer in range(layers)
                )
                for name, kernel in kernels.items()
            }
        if layers > len(self.layer_strengths["mlp"]):
            raise ValueError(f"the edit is for {len(self.layer_strengths['mlp'])} layers")
        return self.layer_strengths
