"""Compile directions and parameters into edits of residual writers; there is no other way to an edit.

Whatever does not depend on an edit's parameters is computed once, into a `WriterGroup`. Compiling for one writer takes
many small steps, which a GPU would do one after the other; writers of one shape on one device are compiled together.

Legend of shapes: S writers of a group, K edits of a batch, k directions an edit, m candidates (layers · k rows of the
basis), d the residual width, i inputs of a writer.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from job.architectures.spec import Writer
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
from job.numerics.basis import Basis, orthonormal_in
from job.numerics.weight_kernel import WeightKernel
from job.records import EditParameters

# Writers compiled together at most: their intermediate values should fit into a processor's caches.
_GROUP_SIZE = 16


@dataclass(frozen=True)
class PreparedWriter:
    """A writer with what edits need of its weight and norms.

    Attributes:
        writer: The writer.
        candidates: The basis' rows as they are before the writer's norms, [m, d], float64, on the weight's device.
        products: Products of its weight with the candidates.
        shape: Shape of the weight, [d, i]; None if the mode needs no weight.
    """

    writer: Writer
    candidates: Tensor
    products: WeightProducts
    shape: torch.Size | None

    @classmethod
    def of(cls, writer: Writer, candidates: Tensor, weight: Tensor | None, mode: RowNormalization) -> PreparedWriter:
        """Read a writer's weight once.

        Args:
            writer: The writer.
            candidates: The basis' rows before the writer's norms, [m, d], float64, on the weight's device.
            weight: The weight, [d, i]; None if the mode is "none".
            mode: The norm-preserving mode.
        """
        if weight is None:
            return cls(writer, candidates, WeightProducts("none"), None)
        return cls(writer, candidates, weight_products(weight, candidates, mode), weight.shape)


@dataclass(frozen=True)
class WriterGroup:
    """S writers that are compiled together, with all that does not depend on an edit's parameters; float64.

    They have one shape, stand on one device, and all or none of them have norms between them and the stream.

    Attributes:
        writers: The writers.
        candidates: The basis' rows before the writers' norms: [S, 1, m, d], or [m, d] where there are no norms.
        gram: Inner products of the candidates, [S, 1, m, m], on the CPU; None where there are no norms.
        products: Products of the weights with the candidates, [S, 1, ...].
        own: The directions of each writer's own layer with their products, [S, 1, k, ...].
        own_weights: The weights of those directions, [S, 1, k].
    """

    writers: tuple[Writer, ...]
    candidates: Tensor
    gram: Tensor | None
    products: WeightProducts
    own: WeightProjections
    own_weights: Tensor

    @classmethod
    def of(cls, basis: Basis, prepared: Sequence[PreparedWriter]) -> WriterGroup:
        """Stack the products of writers that fit together."""
        writers = tuple(one.writer for one in prepared)
        candidates, gram = prepared[0].candidates, None
        if writers[0].post_norms:
            candidates = torch.stack([one.candidates for one in prepared])[:, None]
            gram = (candidates @ candidates.mT).to("cpu", torch.float64)
        products = stack_products([one.products for one in prepared])
        selected = [basis.select(None, writer.layer) for writer in writers]
        coefficients, weights = (torch.stack(part)[:, None] for part in zip(*selected, strict=True))
        own = project(products, candidates, _orthonormal_before_norms(coefficients, gram))
        return cls(writers, candidates, gram, products, own, weights)


def group_writers(basis: Basis, prepared: Iterable[PreparedWriter]) -> Iterator[WriterGroup]:
    """Put writers into groups as they come, so that few are in memory outside a group."""
    waiting: dict[object, list[PreparedWriter]] = {}
    for one in prepared:
        kind = (bool(one.writer.post_norms), one.candidates.device, one.shape)
        waiting.setdefault(kind, []).append(one)
        del one
        if len(waiting[kind]) == _GROUP_SIZE:
            yield WriterGroup.of(basis, waiting.pop(kind))
    while waiting:
        yield WriterGroup.of(basis, waiting.pop(next(iter(waiting))))


@dataclass(frozen=True)
class EditBatch:
    """K edits that are compiled together, with the directions that they select from the basis.

    Attributes:
        parameters: The edits, all with a direction index or all without.
        coefficients: The directions that each edit ablates from all writers as combinations of the candidates,
            [K, k, m], float64; None if each writer loses its own layer's.
        weights: The weights of those directions, [K, k]; None likewise.
    """

    parameters: tuple[EditParameters, ...]
    coefficients: Tensor | None
    weights: Tensor | None

    @classmethod
    def of(cls, basis: Basis, parameters: Sequence[EditParameters]) -> EditBatch:
        """Select the directions of edits once, for all writers."""
        if parameters[0].direction_index is None:
            return cls(tuple(parameters), None, None)
        selected = [basis.select(edit.direction_index, 0) for edit in parameters]
        coefficients, weights = map(torch.stack, zip(*selected, strict=True))
        return cls(tuple(parameters), coefficients, weights)


def split_batches(basis: Basis, parameters: Sequence[EditParameters]) -> tuple[list[EditBatch], Tensor]:
    """Split edits into those of one direction everywhere and those of each layer's own.

    Returns:
        The batches, and where each edit is in them as they follow one another, [K].
    """
    order = sorted(range(len(parameters)), key=lambda number: parameters[number].direction_index is None)
    slots = torch.empty(len(parameters), dtype=torch.long)
    slots[order] = torch.arange(len(parameters))
    everywhere = [edit for edit in parameters if edit.direction_index is not None]
    own = [edit for edit in parameters if edit.direction_index is None]
    return [EditBatch.of(basis, edits) for edits in (everywhere, own) if edits], slots


def compile_edit(writer: PreparedWriter, basis: Basis, parameters: EditParameters) -> WriterEdit:
    """Compile an edit for one writer, as files need it: nothing has leading dimensions.

    Args:
        writer: The writer.
        basis: The directions of all layers, with which the writer was prepared.
        parameters: The edit.
    """
    return compile_edits(WriterGroup.of(basis, [writer]), EditBatch.of(basis, [parameters])).first()


def compile_edits(group: WriterGroup, batch: EditBatch) -> WriterEdit:
    """Compile K edits for S writers, as hooks need them: leading dimensions are [S, K].

    What all writers read in common has no S, [K, k, d]; what all edits read in common is [S, 1, k, d].
    """
    if batch.coefficients is None or batch.weights is None:
        projections, weights = group.own, group.own_weights
    else:
        coefficients = _orthonormal_before_norms(batch.coefficients, group.gram)
        projections, weights = project(group.products, group.candidates, coefficients), batch.weights
    return ablate(group.products, projections, strengths(group.writers, batch.parameters, weights))


def _orthonormal_before_norms(coefficients: Tensor, gram: Tensor | None) -> Tensor:
    """Return combinations, orthonormal in the stream, made so before the norms of writers that have any."""
    return coefficients if gram is None else orthonormal_in(coefficients, gram)


def strengths(writers: Sequence[Writer], parameters: Sequence[EditParameters], weights: Tensor) -> Tensor:
    """Return λ of every writer, edit and direction, [S, K, k], float64, on the CPU.

    λ is the kernel's strength at the writer's layer times the edit's share for the direction times its weight.

    Args:
        writers: S writers.
        parameters: K edits.
        weights: Weights of the directions, [K, k] or [S, 1, k].
    """
    kernels = [
        {component: WeightKernel(**dict(kernel)) for component, kernel in edit.kernels.items()} for edit in parameters
    ]
    by_layer = [[edit[writer.component].strength(writer.layer) for edit in kernels] for writer in writers]
    shares = torch.tensor([edit.strengths for edit in parameters], dtype=torch.float64)  # [K, k]
    return torch.tensor(by_layer, dtype=torch.float64)[..., None] * shares * weights
