"""Compile directions and parameters into edits of residual writers.

A `WriterGroup` holds what is independent of an edit's parameters, computed once. Compilation takes many small steps
that a GPU runs serially, so writers of one shape and device are compiled together. Edits combine candidate directions:
all writers share those of a basis, each layer has its own from a learned path.

Legend of shapes: S writers of a group, K edits of a batch, k directions per edit, m candidates (layers · k of a basis,
stages · k of a path), d the residual width, i inputs of a writer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby

import torch
from torch import Tensor

from job.architectures.spec import Writer
from job.model.device_faults import Shortage, within_memory
from job.numerics.ablation import (
    RowNormalization,
    WeightProducts,
    WeightProjections,
    WriterEdit,
    ablate,
    project,
    stack_products,
    weight_products,
)
from job.numerics.basis import Basis, DirectionPath, orthonormal_in
from job.records import EditParameters

# Most writers compiled together: intermediate values should fit a CPU's caches.
_GROUP_SIZE = 16


@dataclass(frozen=True)
class PreparedWriter:
    """A writer with its precomputed weight products.

    Attributes:
        candidates: Candidates before the writer's norms, [m * span, d], float64, on the weight's device.
        shape: Shape of the weight, [d, i]; None if the mode needs no weight.
    """

    writer: Writer
    candidates: Tensor
    products: WeightProducts
    shape: torch.Size | None

    @classmethod
    def of(cls, writer: Writer, candidates: Tensor, weight: Tensor | None, mode: RowNormalization) -> PreparedWriter:
        """Compute the products of a writer's weight [d, i] (None in mode "none") with candidates [m, d]."""
        if weight is None:
            return cls(writer, candidates, WeightProducts("none"), None)
        products = within_memory(partial(weight_products, weight, candidates, mode))
        if isinstance(products, Shortage):  # the weight in float64 takes four times its memory
            products = weight_products(weight.cpu(), candidates.cpu(), mode).to(weight.device)
        return cls(writer, candidates, products, weight.shape)


@dataclass(frozen=True)
class WriterGroup:
    """S writers of one shape, device and span, compiled together; all or none have post-norms; float64.

    Attributes:
        candidates: Candidates before the writers' norms: [S, 1, m, d], or [m, d] if shared.
        gram: Gram matrices of the candidates, [S, 1, m, m], on the CPU; None if shared.
        products: Products of the weights with the candidates, [S, 1, ...].
        own: Each writer's own layer's directions with products, [S, 1, k, ...]; None for a path.
        own_weights: Weights of those directions, [S, 1, k]; None for a path.
    """

    writers: tuple[Writer, ...]
    candidates: Tensor
    gram: Tensor | None
    products: WeightProducts
    own: WeightProjections | None = None
    own_weights: Tensor | None = None

    @classmethod
    def of(cls, basis: Basis | DirectionPath, prepared: Sequence[PreparedWriter]) -> WriterGroup:
        """Stack the products of matching writers."""
        writers = tuple(one.writer for one in prepared)
        candidates, gram = prepared[0].candidates, None
        if writers[0].post_norms or isinstance(basis, DirectionPath):
            candidates = torch.stack([one.candidates for one in prepared])[:, None]
            gram = (candidates @ candidates.mT).to("cpu", torch.float64)
        products = stack_products([one.products for one in prepared])
        if isinstance(basis, DirectionPath):
            return cls(writers, candidates, gram, products)
        selected = [basis.select(None, writer.layer) for writer in writers]
        coefficients, weights = (torch.stack(part)[:, None] for part in zip(*selected, strict=True))
        own = project(products, candidates, _orthonormal_before_norms(coefficients, gram, writers[0].span))
        return cls(writers, candidates, gram, products, own, weights)


def group_writers(basis: Basis | DirectionPath, prepared: Iterable[PreparedWriter]) -> Iterator[WriterGroup]:
    """Group writers as they are prepared, so that few are in memory outside a group."""
    waiting: dict[object, list[PreparedWriter]] = {}
    for one in prepared:
        kind = (bool(one.writer.post_norms), one.writer.span, one.candidates.device, one.shape)
        waiting.setdefault(kind, []).append(one)
        del one
        if len(waiting[kind]) == _GROUP_SIZE:
            yield WriterGroup.of(basis, waiting.pop(kind))
    while waiting:
        yield WriterGroup.of(basis, waiting.pop(next(iter(waiting))))


@dataclass(frozen=True)
class EditBatch:
    """K edits compiled together: all with a direction index, all without, or all of the same learned directions.

    Attributes:
        coefficients: Ablated directions as combinations of a writer's candidates, [K, k, m], float64; None if each
            writer uses its own layer's directions.
        weights: Weights of those directions, [K, k]; None with coefficients None.
        learned: Name of the learned directions; None if the edits use the basis.
    """

    parameters: tuple[EditParameters, ...]
    coefficients: Tensor | None
    weights: Tensor | None
    learned: str | None = None

    @classmethod
    def of(cls, basis: Basis | DirectionPath, parameters: Sequence[EditParameters]) -> EditBatch:
        """Select the edits' directions, shared by all writers."""
        if isinstance(basis, DirectionPath):
            learned = [edit.directions for edit in parameters if edit.directions is not None]
            coefficients = torch.stack([basis.combine(one.position) for one in learned])
            ones = torch.ones(len(parameters), basis.size, dtype=torch.float64)
            return cls(tuple(parameters), coefficients, ones, learned[0].sha256)
        if parameters[0].direction_index is None:
            return cls(tuple(parameters), None, None)
        selected = [basis.select(edit.direction_index, 0) for edit in parameters]
        coefficients, weights = map(torch.stack, zip(*selected, strict=True))
        return cls(tuple(parameters), coefficients, weights)


def no_directions(name: str) -> DirectionPath:
    """Raise ValueError: there are no learned directions."""
    raise ValueError(f"no learned directions have the hash {name[:12]}")


def split_batches(
    basis: Basis, parameters: Sequence[EditParameters], learned: Callable[[str], DirectionPath] = no_directions
) -> tuple[list[EditBatch], Tensor]:
    """Split edits by the source of their directions; return batches and each edit's position therein, [K]."""
    kinds = [(edit.directions.sha256 if edit.directions else "", edit.direction_index is None) for edit in parameters]
    order = sorted(range(len(parameters)), key=lambda number: kinds[number])
    slots = torch.empty(len(parameters), dtype=torch.long)
    slots[order] = torch.arange(len(parameters))
    batches = []
    for kind, numbers in groupby(order, key=lambda number: kinds[number]):
        source = learned(kind[0]) if kind[0] else basis
        batches.append(EditBatch.of(source, [parameters[number] for number in numbers]))
    return batches, slots


def compile_edit(writer: PreparedWriter, basis: Basis | DirectionPath, parameters: EditParameters) -> WriterEdit:
    """Compile one edit for one writer, without leading dimensions."""
    return compile_edits(WriterGroup.of(basis, [writer]), EditBatch.of(basis, [parameters])).first()


def compile_edits(group: WriterGroup, batch: EditBatch) -> WriterEdit:
    """Compile K edits for S writers, with leading dimensions [S, K].

    Tensors shared by all writers have no S, [K, k, d]; those shared by all edits are [S, 1, k, d].
    """
    span = group.writers[0].span
    if batch.coefficients is not None:
        coefficients = _orthonormal_before_norms(batch.coefficients, group.gram, span)
        projections, weights = project(group.products, group.candidates, coefficients), batch.weights
    else:
        assert group.own is not None  # batch and group use the same directions
        projections, weights = group.own, group.own_weights
    assert weights is not None
    given = strengths(group.writers, batch.parameters, weights).repeat_interleave(span, -1)
    return ablate(group.products, projections, given)


def _orthonormal_before_norms(coefficients: Tensor, gram: Tensor | None, span: int) -> Tensor:
    """Return combinations [..., k, m] for `span` candidates each, [..., k * span, m * span], orthonormal by a Gram."""
    if gram is None:
        return coefficients
    same = torch.eye(span, dtype=coefficients.dtype)
    spread = coefficients[..., :, None, :, None] * same[:, None]
    return orthonormal_in(spread.flatten(-2).flatten(-3, -2), gram)


def strengths(writers: Sequence[Writer], parameters: Sequence[EditParameters], weights: Tensor) -> Tensor:
    """Return λ of every writer, edit and direction, [S, K, k], float64, on the CPU.

    Strengths by layer are λ itself. A kernel's strength is multiplied with the edit's share and the direction's weight,
    [K, k] or [S, 1, k].
    """
    layers = max(writer.layer for writer in writers) + 1
    by_layer = [edit.strengths_by_layer(layers) for edit in parameters]
    given = [[edit[writer.component][writer.layer] for edit in by_layer] for writer in writers]
    by_kernel = torch.tensor([edit.layer_strengths is None for edit in parameters])
    return torch.tensor(given, dtype=torch.float64) * torch.where(by_kernel[:, None], weights, 1.0)
