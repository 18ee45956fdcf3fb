"""Directional ablation of a residual writer, seen from its output and from its weight.

A residual writer computes ``y = W x + b`` and adds y to the residual stream. Ablating the orthonormal
directions V with strengths Λ multiplies its weight by ``I - V Λ Vᵀ`` (Arditi et al. 2024, "Refusal in
Language Models Is Mediated by a Single Direction", for k = 1 and λ = 1). The four modes differ in what
they preserve of the weight's norms:

    none     W' = (I - VΛVᵀ) W
    pre      W' = D (I - VΛVᵀ) D⁻¹ W              rows normalised before, their norms restored after
    full     W' = D S⁻¹ (I - VΛVᵀ) D⁻¹ W          every row keeps its norm exactly
    column   W' = (I - VΛVᵀ) W diag(c)            every column keeps its norm exactly

with D = diag(row norms of W), S = diag(row norms of (I - VΛVᵀ) D⁻¹ W), c_j = |W_j| / |(I - VΛVᵀ) W_j|.
Zero rows have no part in pre and full (D⁻¹ is 0 there and S is 1), zero columns none in column (c is 1).
In every mode the same map is applied to the bias. Because all of them are linear maps of the output
(and, for ``column``, a scaling of the input), an edit needs no weight at trial time:
`OutputEdit` holds it in O(d k) numbers, given the tables that `weight_tables` builds once per module.

Legend of shapes: d outputs (the residual stream), i inputs, k directions, m candidate directions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

RowNormalization = Literal["none", "pre", "full", "column"]

# Below this share of its squared norm a row or column is all but annihilated by the edit, and
# restoring its norm would amplify rounding noise (docs/decisions/0002-edits-are-hooks.md): the edit is refused.
DEGENERATE_SHARE = 1e-6


class DegenerateEditError(ValueError):
    """The edit leaves a row or column of a weight with next to nothing of its norm."""


@dataclass(frozen=True)
class WeightTables:
    """What edits in one mode need to know of a weight, for m candidate directions; float64.

    Attributes:
        row_norms: Row norms of W, [d]; None unless mode is pre or full.
        row_inverses: One over each of them, 0 for those that are 0, [d]; likewise.
        gram: ``Ŵ Ŵᵀ v`` for each candidate v, with Ŵ = D⁻¹W, [m, d]; None unless mode is full.
        column_norms: Column norms of W, [i]; None unless mode is column.
        projections: ``Wᵀ v`` for each candidate v, [m, i]; None unless mode is column.
    """

    mode: RowNormalization
    row_norms: Tensor | None = None
    row_inverses: Tensor | None = None
    gram: Tensor | None = None
    column_norms: Tensor | None = None
    projections: Tensor | None = None


@dataclass(frozen=True)
class OutputEdit:
    """An ablation as a map of a module's output: ``y' = output_scale ∘ (y - write (readᵀ y))``.

    All tensors may have leading batch dimensions (one edit each), written [...].

    Attributes:
        write: Directions times strengths as they are taken out of y, [..., d, k].
        read: Directions as y is measured along them, [..., d, k].
        output_scale: Factor per output (full), [..., d] or None.
        input_scale: Factor per input, applied before the module (column), [..., i] or None.
        least_share: Smallest share of a squared norm that the edit leaves to restore the norm from,
            [...]; 1 in modes that restore none. Below `DEGENERATE_SHARE` the edit must be refused.
    """

    write: Tensor
    read: Tensor
    output_scale: Tensor | None
    input_scale: Tensor | None
    least_share: Tensor

    def apply(self, y: Tensor) -> Tensor:
        """Return the edited output for y [..., t, d] (the input scale is the caller's to apply)."""
        y = y - (y @ self.read) @ self.write.mT
        return y if self.output_scale is None else y * self.output_scale[..., None, :]


def weight_tables(weight: Tensor, candidates: Tensor, mode: RowNormalization) -> WeightTables:
    """Read a weight once, so that no later edit has to.

    Args:
        weight: W, [d, i], any floating dtype.
        candidates: Directions that edits are linear combinations of, [m, d].
        mode: The norm-preserving mode.
    """
    if mode == "none":
        return WeightTables(mode)
    weight = weight.to(torch.float64)
    candidates = candidates.to(weight)
    if mode == "column":
        return WeightTables(mode, column_norms=weight.norm(dim=0), projections=candidates @ weight)
    norms = weight.norm(dim=1)
    inverses = _inverse(norms)
    if mode == "pre":
        return WeightTables(mode, row_norms=norms, row_inverses=inverses)
    unit = weight * inverses[:, None]
    return WeightTables(mode, row_norms=norms, row_inverses=inverses, gram=(candidates @ unit) @ unit.T)


@dataclass(frozen=True)
class WeightProjections:
    """Directions with what is known of a weight along them; what is left to give are strengths. All float64.

    Attributes:
        directions: Orthonormal, [..., k, d].
        gram: ``Ŵ Ŵᵀ v`` for each direction v, [..., k, d]; None unless mode is full.
        projections: ``Wᵀ v`` for each, [..., k, i]; None unless mode is column.
    """

    directions: Tensor
    gram: Tensor | None
    projections: Tensor | None


def stacked(tables: Sequence[WeightTables]) -> WeightTables:
    """Return the tables of S weights of one shape as one's, of which all have leading dimensions [S, 1]."""

    def stack(values: list[Tensor | None]) -> Tensor | None:
        there = [value for value in values if value is not None]
        return torch.stack(there)[:, None] if there else None

    return WeightTables(
        tables[0].mode,
        row_norms=stack([one.row_norms for one in tables]),
        row_inverses=stack([one.row_inverses for one in tables]),
        gram=stack([one.gram for one in tables]),
        column_norms=stack([one.column_norms for one in tables]),
        projections=stack([one.projections for one in tables]),
    )


def output_edit(tables: WeightTables, candidates: Tensor, coefficients: Tensor, strengths: Tensor) -> OutputEdit:
    """Return the ablation of k directions as a map of the module's output, without its weight.

    Args:
        tables: The module's tables for the same candidates.
        candidates: Candidate directions, [m, d].
        coefficients: The k directions as combinations of the candidates, [..., k, m]; the
            combinations must be orthonormal.
        strengths: λ per direction, [..., k].
    """
    return edit_along(tables, aim(tables, candidates, coefficients), strengths)


def aim(tables: WeightTables, candidates: Tensor, coefficients: Tensor) -> WeightProjections:
    """Return the directions of edits, and what the tables say of them.

    Args:
        tables: One module's tables for the same candidates, or several modules' `stacked` ones.
        candidates: Candidate directions, [m, d], or those of several modules, [S, 1, m, d].
        coefficients: Orthonormal combinations of the candidates, [..., k, m]; of several modules [K, k, m], the same
            for all of them, or each its own, [S, K, k, m].
    """
    coefficients = coefficients.to(torch.float64)
    # All but two layers' candidates have no part in a direction, as a rule. Looked at on the CPU, where they come from.
    used = coefficients.flatten(0, -2).any(0).nonzero().flatten()
    coefficients, used = coefficients[..., used].to(candidates.device), used.to(candidates.device)

    def combined(table: Tensor | None) -> Tensor | None:
        if table is None:
            return None
        rows = table.index_select(-2, used)
        if table.dim() == 2:
            return coefficients @ rows
        # As few products as there are modules: broadcasting would copy the table for every edit.
        flat: Tensor = coefficients.flatten(-3, -2) @ rows[:, 0]  # [S, K * k, ...]
        return flat.view(len(flat), *coefficients.shape[-3:-1], -1)

    directions = combined(candidates.to(torch.float64))
    assert directions is not None
    return WeightProjections(directions, combined(tables.gram), combined(tables.projections))


def edit_along(tables: WeightTables, aimed: WeightProjections, strengths: Tensor) -> OutputEdit:
    """Return the ablation of directions with strengths λ [..., k]; leading dimensions are broadcast."""
    directions = aimed.directions
    strengths = strengths.to(directions)
    write = strengths[..., None] * directions  # [..., k, d]
    whole = torch.ones(write.shape[:-2], dtype=torch.float64, device=write.device)
    if tables.mode == "none":
        return OutputEdit(write.mT, directions.mT, None, None, whole)
    if tables.mode == "column":
        assert tables.column_norms is not None
        assert aimed.projections is not None
        lost = ((2 * strengths - strengths**2)[..., None] * aimed.projections**2).sum(-2)
        share = _share(tables.column_norms**2, lost)
        return OutputEdit(write.mT, directions.mT, None, share.rsqrt(), share.amin(-1))
    assert tables.row_norms is not None
    assert tables.row_inverses is not None
    scaled, read = tables.row_norms[..., None, :] * write, directions * tables.row_inverses[..., None, :]
    if tables.mode == "pre":
        return OutputEdit(scaled.mT, read.mT, None, None, whole)
    assert aimed.gram is not None
    # 1 - 2 v·g + v·(vᵀg)v, in place: new memory would take longer than the arithmetic.
    crossed = (directions @ aimed.gram.mT).mT @ write
    square = crossed.sub_(aimed.gram, alpha=2).mul_(write).sum(-2).add_(1)
    square.masked_fill_(tables.row_inverses == 0, 1.0)
    least = square.amin(-1)
    return OutputEdit(scaled.mT, read.mT, square.rsqrt_(), None, least)


def _share(squares: Tensor, lost: Tensor) -> Tensor:
    """Return what share of |W_j|² [i] is left when so much of it is lost [..., i]; 1 for zero columns."""
    zero = squares == 0
    return torch.where(zero, 1.0, 1 - lost / torch.where(zero, 1.0, squares))


def _refuse_degenerate(share: Tensor, kind: str) -> None:
    if bool((share < DEGENERATE_SHARE).any()):
        raise DegenerateEditError(
            f"the edit leaves next to nothing of {kind} {int(share.argmin())} to restore its norm from"
        )


def edit_weight(weight: Tensor, directions: Tensor, strengths: Tensor, mode: RowNormalization) -> Tensor:
    """Return the ablated weight in float64.

    This is the definition that `output_edit` is tested against, and what the export writes.

    Args:
        weight: W, [d, i], any floating dtype.
        directions: Orthonormal directions, [k, d].
        strengths: λ per direction, [k].
        mode: The norm-preserving mode.

    Raises:
        DegenerateEditError: The edit would have to restore a norm from next to nothing.
    """
    weight = weight.to(torch.float64)
    directions, strengths = directions.to(weight), strengths.to(weight)
    if mode == "none":
        return _project(weight, directions, strengths)
    if mode == "column":
        edited = _project(weight, directions, strengths)
        squares = weight.square().sum(0)
        share = _share(squares, squares - edited.square().sum(0))
        _refuse_degenerate(share, "column")
        return edited * share.rsqrt()
    norms = weight.norm(dim=1, keepdim=True)
    edited = _project(weight * _inverse(norms), directions, strengths)
    if mode == "full":
        edited = edited / _restored_norms(edited, norms)
    restored: Tensor = edited * norms
    return restored


def edit_bias(bias: Tensor, weight: Tensor, directions: Tensor, strengths: Tensor, mode: RowNormalization) -> Tensor:
    """Return the bias of the ablated module in float64, [d]; the arguments are `edit_weight`'s."""
    weight = weight.to(torch.float64)
    bias, directions, strengths = bias.to(weight), directions.to(weight), strengths.to(weight)
    if mode in ("none", "column"):
        return _project(bias, directions, strengths)
    norms = weight.norm(dim=1, keepdim=True)
    inverse = _inverse(norms)
    edited: Tensor = bias - norms[:, 0] * ((directions.T * strengths) @ (directions @ (inverse[:, 0] * bias)))
    if mode == "full":
        unit = _project(weight * inverse, directions, strengths)
        edited = edited / _restored_norms(unit, norms)[:, 0]
    return edited


def _project(target: Tensor, directions: Tensor, strengths: Tensor) -> Tensor:
    """Return ``(I - VΛVᵀ) target`` for target [d] or [d, i]."""
    projected: Tensor = target - (directions.T * strengths) @ (directions @ target)
    return projected


def _inverse(norms: Tensor) -> Tensor:
    """Return 1 / norms, and 0 where a norm is 0."""
    zero = norms == 0
    return torch.where(zero, 0.0, 1 / torch.where(zero, 1.0, norms))


def _restored_norms(unit: Tensor, norms: Tensor) -> Tensor:
    """Return the norms of the ablated unit rows [d, 1], 1 for rows of norm 0."""
    restored = torch.where(norms == 0, 1.0, unit.norm(dim=1, keepdim=True))
    _refuse_degenerate(restored[:, 0] ** 2, "row")
    return restored
