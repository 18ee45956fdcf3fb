"""Memory of the search's hooks, derived from `job.edits`: products with the weights, and a batch's tables.

Both lie beside each writer's weight as long as the search lasts, whatever the rows of a forward. Two writers per layer
count: attention, whose inputs are its heads' values, and the MLP. Experts' outputs are edited as one sum without norms.
"""

from __future__ import annotations

from typing import Literal

from job.preflight.activation_memory import Edits
from job.preflight.model_facts import ModelFacts
from job.records import Record

_PRODUCT, _TABLE = 8, 4  # bytes of a float64, of a float32


class EditTables(Record):
    """What determines the hooks' tables.

    Attributes:
        mode: ablation.row_normalization.
        directions: Directions of each layer.
        trials: Trials whose edits are active together.
    """

    mode: Literal["none", "pre", "full", "column"] = "none"
    directions: int = 1
    trials: int = 1

    @property
    def edits(self) -> Edits:
        """What the hooks change in a forward."""
        return "columns" if self.mode == "column" else "outputs"


def product_bytes(facts: ModelFacts, tables: EditTables, layers: range | None = None) -> int:
    """Return the bytes of the weights' products with the directions of all layers, for some or all layers' writers."""
    candidates = facts.layers * tables.directions
    own = tables.directions
    numbers = 0
    for inputs in _inputs(facts):
        numbers += own * facts.hidden
        if tables.mode in ("pre", "full"):
            numbers += 2 * facts.hidden
        if tables.mode == "full":
            numbers += (candidates + own) * facts.hidden
        if tables.mode == "column":
            numbers += (1 + candidates + own) * inputs
    return _count(facts, layers) * numbers * _PRODUCT


def batch_bytes(facts: ModelFacts, tables: EditTables, layers: range | None = None) -> int:
    """Return the bytes of the tables of all trials' edits, for some or all layers' writers."""
    numbers = 0
    for inputs in _inputs(facts):
        numbers += 2 * tables.directions * facts.hidden
        numbers += {"full": facts.hidden, "column": inputs}.get(tables.mode, 0)
    return _count(facts, layers) * tables.trials * numbers * _TABLE


def _count(facts: ModelFacts, layers: range | None) -> int:
    return facts.layers if layers is None else len(layers)


def _inputs(facts: ModelFacts) -> tuple[int, int]:
    """Return the inputs of a layer's two writers."""
    return facts.heads * facts.value_dim, facts.intermediate
