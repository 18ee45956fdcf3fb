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
Behind a norm with gain g, a write may differ from its read: with reads B and writes A = B K, K the norm's
`write_metric`, the modes hold A Λ Bᵀ in place of V Λ Vᵀ, and the directions are orthonormal in K.

In every mode the same map is applied to the bias. Because all of them are linear maps of the output
(and, for ``column``, a scaling of the input), an edit needs no weight at trial time:
`WriterEdit` holds it in O(d k) numbers, given the `WeightProducts` that are made once per module.

Legend of shapes: d outputs (the residual stream), i inputs, k directions, m candidate directions, S writers, K edits.
All arithmetic is in float64; strengths λ have no unit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Self

import torch
from torch import Tensor

RowNormalization = Literal["none", "pre", "full", "column"]

# Below this share of its squared norm a row or column is all but annihilated by the edit, and
# restoring its norm would amplify rounding noise (docs/decisions/0002-edits-are-hooks.md): the edit is refused.
DEGENERATE_SHARE = 1e-6
# Gains below this share of their root mean square count as that: writing v/g would blow up an entry that the stream
# hardly sees, and with it the norm's denominator (docs/decisions/0033-dual-pull-back.md).
_LEAST_GAIN = 0.1


class DegenerateEditError(ValueError):
    """Ablation leaves almost none of a row's or column's norm."""


@dataclass(frozen=True)
class WeightProducts:
    """Products of a weight W with m candidate directions, computed once per module; float64.

    Attributes:
        mode: The norm-preserving mode.
        row_norms: Row norms of W, [..., d]; None unless mode is pre or full.
        row_inverses: 1 / row_norms, 0 for zero rows, [..., d]; None unless mode is pre or full.
        row_products: ``Ŵ Ŵᵀ v`` for each candidate v, with Ŵ = D⁻¹W, [..., m, d]; None unless mode is full.
        column_norms: Column norms of W, [..., i]; None unless mode is column.
        column_products: ``Wᵀ v`` for each candidate v, [..., m, i]; None unless mode is column.
        metric: Factors from what is read to what is written, [..., d]; None: the same is written.
        column_writes: ``Wᵀ (metric ∘ v)`` for each candidate v, [..., m, i]; None unless mode is column with a metric.
    """

    mode: RowNormalization
    row_norms: Tensor | None = None
    row_inverses: Tensor | None = None
    row_products: Tensor | None = None
    column_norms: Tensor | None = None
    column_products: Tensor | None = None
    metric: Tensor | None = None
    column_writes: Tensor | None = None

    def to(self, device: torch.device) -> Self:
        """Return the products on a device."""
        tables = (value if value is None else value.to(device) for name, value in vars(self).items() if name != "mode")
        return type(self)(self.mode, *tables)


@dataclass(frozen=True)
class WeightProjections:
    """Directions with precomputed weight products; only the strengths are missing. float64.

    Attributes:
        directions: Orthonormal in the metric, [..., k, d].
        row_products: ``Ŵ Ŵᵀ v`` for each direction v, [..., k, d]; None unless mode is full.
        column_products: ``Wᵀ v`` for each direction v, [..., k, i]; None unless mode is column.
        column_writes: ``Wᵀ (metric ∘ v)`` for each, [..., k, i]; None unless mode is column with a metric.
    """

    directions: Tensor
    row_products: Tensor | None
    column_products: Tensor | None
    column_writes: Tensor | None = None


@dataclass(frozen=True)
class WriterEdit:
    """An ablation compiled for one writer; leading dimensions [...] hold several writers or edits.

    With D = diag(row_norms), or I without row norms, it maps an output y to
    ``output_scale ∘ (y - D writeᵀ (read D⁻¹ y))``. The input is multiplied with `input_scale` first.

    Attributes:
        read: Directions along which an output is measured, [..., k, d].
        write: Directions, or the vectors dual to them, times λ: subtracted per unit measured, [..., k, d].
        row_norms: D, for pre and full, [..., d] or None.
        row_inverses: D⁻¹, 0 for zero rows, [..., d] or None.
        output_scale: Factor per output that restores row norms (full), [..., d] or None.
        input_scale: Factor per input that restores column norms (column), [..., i] or None.
        least_share: Smallest remaining share of a squared norm, [...]; 1 in modes that restore no norms. Below
            `DEGENERATE_SHARE` the edit must be refused.
        finite: Whether the strengths fit float32, [...], on the CPU. Where they do not, write is 0.
    """

    read: Tensor
    write: Tensor
    row_norms: Tensor | None
    row_inverses: Tensor | None
    output_scale: Tensor | None
    input_scale: Tensor | None
    least_share: Tensor
    finite: Tensor

    @property
    def output_read(self) -> Tensor:
        """Directions along which the module's own output is measured, read D⁻¹, [..., k, d]."""
        return self.read if self.row_inverses is None else self.read * self.row_inverses[..., None, :]

    @property
    def output_write(self) -> Tensor:
        """Vectors subtracted from the module's own output, write D, [..., k, d]."""
        return self.write if self.row_norms is None else self.row_norms[..., None, :] * self.write

    def apply(self, y: Tensor) -> Tensor:
        """Return the edited output for y [..., t, d]; the caller applies the input scale."""
        y = y - (y @ self.output_read.mT) @ self.output_write
        return y if self.output_scale is None else y * self.output_scale[..., None, :]

    def first(self) -> Self:
        """Return the first writer's first edit, without leading dimensions."""

        def pick(table: Tensor, dimensions: int) -> Tensor:
            return table.reshape(-1, *table.shape[table.dim() - dimensions :])[0]

        def pick_optional(table: Tensor | None) -> Tensor | None:
            return None if table is None else pick(table, 1)

        return type(self)(
            read=pick(self.read, 2),
            write=pick(self.write, 2),
            row_norms=pick_optional(self.row_norms),
            row_inverses=pick_optional(self.row_inverses),
            output_scale=pick_optional(self.output_scale),
            input_scale=pick_optional(self.input_scale),
            least_share=pick(self.least_share, 0),
            finite=pick(self.finite, 0),
        )


def write_metric(gain: Tensor) -> Tensor:
    """Return the factors k [d] by which a direction read before a norm is written, from the norm's gain g [d].

    A direction v of the stream is read as g ∘ v. Of all writes that remove it there, v/g moves the stream least, which
    is k = 1/g² times what is read. The scale of k is arbitrary: here it is 1 where |g| is the root mean square. Smaller
    |g| than a tenth of that count as a tenth.
    """
    gain = gain.to(torch.float64)
    mean = gain.square().mean().sqrt()
    relative = torch.where(mean > 0, gain.abs() / torch.where(mean > 0, mean, 1.0), 1.0)
    return relative.clamp_min(_LEAST_GAIN).square().reciprocal()


def weight_products(
    weight: Tensor, candidates: Tensor, mode: RowNormalization, metric: Tensor | None = None
) -> WeightProducts:
    """Compute the products of a weight W [d, i], any floating dtype, with candidate directions [m, d].

    `metric` [d] gives the writes (`write_metric`). The mode "none" does not read the weight.
    """
    metric = None if metric is None else metric.to(candidates.device, torch.float64)
    if mode == "none":
        return WeightProducts(mode, metric=metric)
    weight = weight.to(torch.float64)
    candidates = candidates.to(weight)
    if mode == "column":
        return WeightProducts(
            mode,
            column_norms=weight.norm(dim=0),
            column_products=candidates @ weight,
            metric=metric,
            column_writes=None if metric is None else (candidates * metric) @ weight,
        )
    norms = weight.norm(dim=1)
    inverses = _inverse(norms)
    if mode == "pre":
        return WeightProducts(mode, row_norms=norms, row_inverses=inverses, metric=metric)
    unit = weight * inverses[:, None]
    return WeightProducts(
        mode, row_norms=norms, row_inverses=inverses, row_products=(candidates @ unit) @ unit.T, metric=metric
    )


def stack_products(products: Sequence[WeightProducts]) -> WeightProducts:
    """Stack the products of S weights of one shape along leading dimensions [S, 1]."""

    def stack(values: list[Tensor | None]) -> Tensor | None:
        present = [value for value in values if value is not None]
        return torch.stack(present)[:, None] if present else None

    return WeightProducts(
        products[0].mode,
        row_norms=stack([one.row_norms for one in products]),
        row_inverses=stack([one.row_inverses for one in products]),
        row_products=stack([one.row_products for one in products]),
        column_norms=stack([one.column_norms for one in products]),
        column_products=stack([one.column_products for one in products]),
        metric=stack([one.metric for one in products]),
        column_writes=stack([one.column_writes for one in products]),
    )


def project(products: WeightProducts, candidates: Tensor, coefficients: Tensor) -> WeightProjections:
    """Combine candidate directions and their weight products linearly.

    Args:
        products: Products for the same candidates, of one module or stacked for S modules.
        candidates: Candidate directions, [m, d], or [S, 1, m, d] for S modules.
        coefficients: Combinations of the candidates, orthonormal in the metric, [..., k, m]. For S modules: [K, k, m],
            shared, or [S, K, k, m].
    """
    coefficients = coefficients.to(torch.float64)
    # A direction combines at most two layers' candidates. Tested on the CPU, where the coefficients are.
    used = coefficients.flatten(0, -2).any(0).nonzero().flatten()
    coefficients, used = coefficients[..., used].to(candidates.device), used.to(candidates.device)

    def combine(table: Tensor | None) -> Tensor | None:
        if table is None:
            return None
        rows = table.index_select(-2, used)
        if table.dim() == 2:
            return coefficients @ rows
        # One product per module: broadcasting would copy the table for every edit.
        flat: Tensor = coefficients.flatten(-3, -2) @ rows[:, 0]  # [S, K * k, ...]
        return flat.view(len(flat), *coefficients.shape[-3:-1], -1)

    directions = combine(candidates.to(torch.float64))
    assert directions is not None
    tables = (products.row_products, products.column_products, products.column_writes)
    return WeightProjections(directions, *map(combine, tables))


def ablate(products: WeightProducts, projections: WeightProjections, strengths: Tensor) -> WriterEdit:
    """Return the ablation of directions with strengths λ [..., k], on the CPU; leading dimensions are broadcast."""
    directions = projections.directions
    # A strength beyond float32 would turn every row into NaN, since hooks multiply all rows with the edit's tables.
    finite = strengths.to(torch.float32).isfinite().all(-1)
    strengths = torch.where(finite[..., None], strengths, 0.0).to(directions)
    write = strengths[..., None] * directions  # [..., k, d]
    if products.metric is not None:
        write = write * products.metric[..., None, :]
    output_scale = input_scale = None
    least_share = torch.ones(write.shape[:-2], dtype=torch.float64, device=write.device)
    if products.mode == "column":
        input_scale, least_share = _column_scale(products, projections, strengths, write)
    elif products.mode == "full":
        output_scale, least_share = _row_scale(products, projections, write)
    return WriterEdit(
        read=directions,
        write=write,
        row_norms=products.row_norms,
        row_inverses=products.row_inverses,
        output_scale=output_scale,
        input_scale=input_scale,
        least_share=least_share,
        finite=finite,
    )


def _column_scale(
    products: WeightProducts, projections: WeightProjections, strengths: Tensor, write: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the factors that restore column norms, [..., i], and the least share left of a squared norm, [...]."""
    assert products.column_norms is not None
    assert projections.column_products is not None
    if projections.column_writes is None:
        lost = ((2 * strengths - strengths**2)[..., None] * projections.column_products**2).sum(-2)
    else:
        # 2 (Wᵀw)·(Wᵀb) - (Wᵀb)·(w·wᵀ)(Wᵀb) for b read and w written, by column.
        along = strengths[..., None] * projections.column_writes
        lost = ((2 * along - (write @ write.mT) @ projections.column_products) * projections.column_products).sum(-2)
    share = _share(products.column_norms**2, lost)
    return share.rsqrt(), share.amin(-1)


def _row_scale(products: WeightProducts, projections: WeightProjections, write: Tensor) -> tuple[Tensor, Tensor]:
    """Return the factors that restore row norms, [..., d], and the least share left of a squared norm, [...]."""
    assert products.row_inverses is not None
    assert projections.row_products is not None
    # 1 - 2 w·p + w·(bᵀp)w for b read, w written and p = ŴŴᵀb; in place, which is faster than new memory.
    crossed = (projections.directions @ projections.row_products.mT).mT @ write
    square = crossed.sub_(projections.row_products, alpha=2).mul_(write).sum(-2).add_(1)
    square.masked_fill_(products.row_inverses == 0, 1.0)
    least = square.amin(-1)
    return square.rsqrt_(), least


def _share(squares: Tensor, lost: Tensor) -> Tensor:
    """Return the share of |W_j|² [i] that remains after `lost` [..., i]; 1 for zero columns."""
    zero = squares == 0
    return torch.where(zero, 1.0, 1 - lost / torch.where(zero, 1.0, squares))


def _refuse_degenerate(share: Tensor, kind: str) -> None:
    if bool((share < DEGENERATE_SHARE).any()):
        raise DegenerateEditError(
            f"the edit leaves almost nothing of {kind} {int(share.argmin())} from which to restore its norm"
        )


def edit_weight(weight: Tensor, edit: WriterEdit, mode: RowNormalization) -> Tensor:
    """Return the ablation of a weight [d, i], any floating dtype, in float64.

    This is the reference for hooks, and what exports write. Norms come from the weight itself; of the edit, which has
    no leading dimensions, only `read` and `write` are used. Raises DegenerateEditError if the remaining norm is too
    small to restore the original one.
    """
    weight = weight.to(torch.float64)
    if mode == "none":
        return _without(weight, edit)
    if mode == "column":
        edited = _without(weight, edit)
        squares = weight.square().sum(0)
        share = _share(squares, squares - edited.square().sum(0))
        _refuse_degenerate(share, "column")
        return edited * share.rsqrt()
    norms = weight.norm(dim=1, keepdim=True)
    edited = _without(weight * _inverse(norms), edit)
    if mode == "full":
        edited = edited / _restored_norms(edited, norms)
    restored: Tensor = edited * norms
    return restored


def edit_bias(bias: Tensor, weight: Tensor, edit: WriterEdit, mode: RowNormalization) -> Tensor:
    """Return the ablated module's bias in float64, [d]; see `edit_weight` for the other arguments."""
    weight = weight.to(torch.float64)
    bias = bias.to(weight)
    if mode in ("none", "column"):
        return _without(bias, edit)
    norms = weight.norm(dim=1, keepdim=True)
    inverse = _inverse(norms)
    edited: Tensor = bias - norms[:, 0] * _part_along(inverse[:, 0] * bias, edit)
    if mode == "full":
        unit = _without(weight * inverse, edit)
        edited = edited / _restored_norms(unit, norms)[:, 0]
    return edited


def _without(target: Tensor, edit: WriterEdit) -> Tensor:
    """Return ``(I - writeᵀ read) target`` for target [d] or [d, i]."""
    return target - _part_along(target, edit)


def _part_along(target: Tensor, edit: WriterEdit) -> Tensor:
    part: Tensor = edit.write.to(target).mT @ (edit.read.to(target) @ target)
    return part


def _inverse(norms: Tensor) -> Tensor:
    zero = norms == 0
    return torch.where(zero, 0.0, 1 / torch.where(zero, 1.0, norms))


def _restored_norms(unit: Tensor, norms: Tensor) -> Tensor:
    """Return the norms of the ablated unit rows [d, 1], 1 for rows of norm 0."""
    restored = torch.where(norms == 0, 1.0, unit.norm(dim=1, keepdim=True))
    _refuse_degenerate(restored[:, 0] ** 2, "row")
    return restored
