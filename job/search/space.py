"""The space of edits that is searched: parameters, their ranges, and known points to begin with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution

from job.records import COMPONENTS, Component, EditParameters, KernelParameters

GLOBAL, PER_LAYER = "global", "per layer"

# Edits to begin with: whose direction, at what depth as a share of the model's, and min_weight at as great a distance
# from the middle layer as the model is deep.
_KNOWN = (
    (GLOBAL, 0.4, 1.0), (GLOBAL, 0.6, 1.0), (PER_LAYER, 0.5, 1.0), (GLOBAL, 0.5, 1.0),
    (GLOBAL, 0.3, 1.0), (GLOBAL, 0.7, 1.0), (PER_LAYER, 0.5, 0.0), (GLOBAL, 0.8, 1.0),
)  # fmt: skip


class Space(Protocol):
    """A space of edits."""

    def distributions(self) -> dict[str, BaseDistribution]:
        """Return the range of every parameter."""

    def known_points(self) -> list[dict[str, Any]]:
        """Return the parameters to try before any other."""

    def edit(self, params: dict[str, Any]) -> EditParameters:
        """Return the edit that a trial's parameters describe."""


@dataclass(frozen=True)
class SearchSpace:
    """The parameters of an edit and their ranges, for a model of so many layers.

    Attributes:
        name: "wide", or "field" for the ranges that other tools of this kind use.
        layers: Number of layers.
        directions: Directions of each layer's basis; the strength of every one but the first is searched.
    """

    name: str
    layers: int
    directions: int = 1

    def distributions(self) -> dict[str, BaseDistribution]:
        """Return the range of every parameter."""
        last = float(self.layers - 1)
        field = self.name == "field"
        found: dict[str, BaseDistribution] = {
            "direction_scope": CategoricalDistribution((GLOBAL, PER_LAYER)),
            "direction_index": FloatDistribution(*((0.4 * last, 0.9 * last) if field else (0.2 * last, last))),
        }
        for component in COMPONENTS:
            weights = {"attention": (0.8, 1.5), "mlp": (-0.25, 1.5)}[component] if field else (0.0, 2.0)
            position = (0.6 * last, last) if field else (0.2 * last, last)
            distance = (1.0, max(0.6 * last, 1.0)) if field else (1.0, max(last, 1.0))
            found[f"{component}.max_weight"] = FloatDistribution(*weights)
            found[f"{component}.max_weight_position"] = FloatDistribution(*position)
            found[f"{component}.min_weight"] = FloatDistribution(0.0, 1.0)
            found[f"{component}.min_weight_distance"] = FloatDistribution(*distance)
        for number in range(1, self.directions):
            found[_strength_name(number)] = FloatDistribution(0.0, 1.0)
        return found

    def known_points(self) -> list[dict[str, Any]]:
        """Return the parameters to try before any other: ablations that are known to do well, the likeliest first.

        They ablate one direction in full from every layer, as Arditi et al. (2024) do: that of a layer at one of
        several depths, or each layer's own; one has each layer's own at a strength that falls to half at both ends.
        Where the space does not hold such an edit its nearest one takes its place; repetitions are left out.
        """
        last = float(self.layers - 1)
        found: list[dict[str, Any]] = []
        for scope, depth, edge in _KNOWN:
            wanted = {
                "direction_scope": scope,
                "direction_index": depth * last,
                **{_strength_name(number): 0.0 for number in range(1, self.directions)},
            }
            for component in COMPONENTS:
                wanted[f"{component}.max_weight"] = 1.0
                wanted[f"{component}.max_weight_position"] = 0.5 * last
                wanted[f"{component}.min_weight"] = edge
                wanted[f"{component}.min_weight_distance"] = last
            nearest = {name: _nearest(wanted[name], range_) for name, range_ in self.distributions().items()}
            if nearest not in found:
                found.append(nearest)
        return found

    def edit(self, params: dict[str, Any]) -> EditParameters:
        """Return the edit that a trial's parameters describe; min_weight is a share of max_weight."""
        index = params["direction_index"] if params["direction_scope"] == GLOBAL else None
        return EditParameters(
            direction_index=index,
            kernels={component: _kernel(component, params) for component in COMPONENTS},
            # By what the trial has, so that a study can be read without the directions.
            strengths=(1.0, *(params[name] for name in map(_strength_name, range(1, len(params))) if name in params)),
        )


def _nearest(value: Any, distribution: BaseDistribution) -> Any:
    if isinstance(distribution, FloatDistribution):
        return min(max(value, distribution.low), distribution.high)
    return value


def _strength_name(number: int) -> str:
    return f"direction_{number}.strength"


def _kernel(component: Component, params: dict[str, Any]) -> KernelParameters:
    peak = max(0.0, params[f"{component}.max_weight"])
    return KernelParameters(
        max_weight=peak,
        max_weight_position=params[f"{component}.max_weight_position"],
        min_weight=peak * params[f"{component}.min_weight"],
        min_weight_distance=params[f"{component}.min_weight_distance"],
    )
