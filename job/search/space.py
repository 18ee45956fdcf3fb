"""The search space of edits: parameters, ranges, and known starting points."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution

from job.records import COMPONENTS, Component, EditParameters, KernelParameters

GLOBAL, PER_LAYER = "global", "per layer"

# Starting points: direction scope, layer as a share of the depth, and min_weight, which is reached one model depth away
# from the middle layer.
_KNOWN = (
    (GLOBAL, 0.4, 1.0), (GLOBAL, 0.6, 1.0), (PER_LAYER, 0.5, 1.0), (GLOBAL, 0.5, 1.0),
    (GLOBAL, 0.3, 1.0), (GLOBAL, 0.7, 1.0), (PER_LAYER, 0.5, 0.0), (GLOBAL, 0.8, 1.0),
)  # fmt: skip


class Space(Protocol):
    """A search space of edits."""

    def distributions(self) -> dict[str, BaseDistribution]:
        """Return the range of every parameter."""

    def known_points(self) -> list[dict[str, Any]]:
        """Return the parameters to try first."""

    def edit(self, params: dict[str, Any]) -> EditParameters:
        """Return a trial's edit."""


@dataclass(frozen=True)
class SearchSpace:
    """Kernel parameters of an edit and their ranges.

    Attributes:
        name: "wide", or "field" for the ranges of comparable tools.
        directions: Directions per layer; the strength of all but the first is searched.
    """

    name: str
    layers: int
    directions: int = 1

    def distributions(self) -> dict[str, BaseDistribution]:
        """Return the range of every parameter."""
        last = float(self.layers - 1)
        field = self.name == "field"
        ranges: dict[str, BaseDistribution] = {
            "direction_scope": CategoricalDistribution((GLOBAL, PER_LAYER)),
            "direction_index": FloatDistribution(*((0.4 * last, 0.9 * last) if field else (0.2 * last, last))),
        }
        for component in COMPONENTS:
            weights = {"attention": (0.8, 1.5), "mlp": (-0.25, 1.5)}[component] if field else (0.0, 2.0)
            position = (0.6 * last, last) if field else (0.2 * last, last)
            distance = (1.0, max(0.6 * last, 1.0)) if field else (1.0, max(last, 1.0))
            ranges[f"{component}.max_weight"] = FloatDistribution(*weights)
            ranges[f"{component}.max_weight_position"] = FloatDistribution(*position)
            ranges[f"{component}.min_weight"] = FloatDistribution(0.0, 1.0)
            ranges[f"{component}.min_weight_distance"] = FloatDistribution(*distance)
        for number in range(1, self.directions):
            ranges[_strength_name(number)] = FloatDistribution(0.0, 1.0)
        return ranges

    def known_points(self) -> list[dict[str, Any]]:
        """Return known good ablations to try first, the best first.

        They ablate one direction fully in every layer, as Arditi et al. (2024) do: a single layer's at several depths,
        or each layer's own. One falls to half strength at both ends. Points outside the space are moved to the nearest
        inside; duplicates are dropped.
        """
        last = float(self.layers - 1)
        points: list[dict[str, Any]] = []
        for scope, depth, edge in _KNOWN:
            point = {
                "direction_scope": scope,
                "direction_index": depth * last,
                **{_strength_name(number): 0.0 for number in range(1, self.directions)},
            }
            for component in COMPONENTS:
                point[f"{component}.max_weight"] = 1.0
                point[f"{component}.max_weight_position"] = 0.5 * last
                point[f"{component}.min_weight"] = edge
                point[f"{component}.min_weight_distance"] = last
            nearest = {name: _nearest(point[name], range_) for name, range_ in self.distributions().items()}
            if nearest not in points:
                points.append(nearest)
        return points

    def edit(self, params: dict[str, Any]) -> EditParameters:
        """Return a trial's edit; min_weight is a share of max_weight."""
        index = params["direction_index"] if params["direction_scope"] == GLOBAL else None
        return EditParameters(
            direction_index=index,
            kernels={component: _kernel(component, params) for component in COMPONENTS},
            # From the trial's own parameters, so that a study can be read without the directions.
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
