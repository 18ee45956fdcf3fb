"""The weight kernel: how ablation strength falls off with distance from a layer (heretic's, in its terms)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class WeightKernel:
    """Ablation strength as a function of the layer, for one component.

    Attributes:
        max_weight: Strength at the peak.
        max_weight_position: Layer index of the peak, fractional.
        min_weight: Strength at the edge of the kernel.
        min_weight_distance: Distance from the peak to the edge, in layers; beyond it there is no edit.
    """

    max_weight: float
    max_weight_position: float
    min_weight: float
    min_weight_distance: float

    def strength(self, layer: int) -> float:
        """Return λ for a layer: linear from max_weight at the peak to min_weight at the edge, then 0."""
        distance = abs(layer - self.max_weight_position)
        if distance > self.min_weight_distance:
            return 0.0
        share = distance / self.min_weight_distance if self.min_weight_distance else 0.0
        return self.max_weight + share * (self.min_weight - self.max_weight)
