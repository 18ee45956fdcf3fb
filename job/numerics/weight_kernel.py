"""The weight kernel of heretic: ablation strength by distance from a layer."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class WeightKernel:
    """Ablation strength of one component as a function of the layer.

    Attributes:
        max_weight: Strength at the peak.
        max_weight_position: Layer index of the peak, fractional.
        min_weight: Strength at the edge.
        min_weight_distance: Layers from peak to edge; the strength is 0 beyond.
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
