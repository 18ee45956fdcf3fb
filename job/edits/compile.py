"""Compile directions and parameters into edits of residual writers; there is no other way to an edit.

Whatever does not depend on an edit's parameters is computed once, into a `WriterGroup`. Compiling for one writer takes
many small steps, which a GPU would do one after the other; writers of one shape on one device are compiled together.

Edits take their directions from the job's basis, or from a path of directions that were learned for them. Each has
candidates, which edits combine: those of a basis are the same for all writers, those of a path are each layer's own.

Legend of shapes: S writers of a group, K edits of a batch, k directions an edit, m candidates (layers · k rows of a
basis, stages · k rows of a path), d the residual width, i inputs of a writer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

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
from job.numerics.basis import Basis, DirectionPath, orthonormal_in
from job.records import EditParameters

# Writers compiled together at most: their intermediate values should fit into a processor's caches.
_GROUP_SIZE = 16


@dataclass(frozen=True)
class PreparedWriter:
    """A writer with what edits need of its weight and norms.

    Attributes:
        writer: The writer.
        candidates: The candidates as they are before the writer's norms, [m, d], float64, on the weight's device.
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
            candidates: The candidates before the writer's norms, [m, d], float64, on the weight's device.
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
        candidates: The candidates before the writers' norms: [S, 1, m, d], or [m, d] where all writers have the same.
        gram: Inner products of the candidates, [S, 1, m, m], on the CPU; None where all writers have the same.
        products: Products of the weights with the candidates, [S, 1, ...].
        own: The directions of each writer's own layer with their products, [S, 1, k, ...]; None of a path.
        own_weights: The weights of those directions, [S, 1, k]; None likewise.
    """

    writers: tuple[Writer, ...]
    candidates: Tensor
    gram: Tensor | None
    products: WeightProducts
    own: WeightProjections | None = None
    own_weights: Tensor | None = None

    @classmethod
    def of(cls, basis: Basis | DirectionPath, prepared: Sequence[PreparedWriter]) -> WriterGroup:
        """Stack the products of writers that fit together."""
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
        own = project(products, candidates, _orthonormal_before_norms(coefficients, gram))
        return cls(writers, candidates, gram, products, own, weights)


def group_writers(basis: Basis | DirectionPath, prepared: Iterable[PreparedWriter]) -> Iterator[WriterGroup]:
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
        parameters: The edits: all with a direction index, all without, or all with the same learned directions.
        coefficients: The directions that each edit ablates as combinations of every writer's candidates, [K, k, m],
            float64; None if each writer loses its own layer's directions of the basis.
        weights: The weights of those directions, [K, k]; None likewise.
        learned: Name of the learned directions; None if the edits take theirs from the basis.
    """

    parameters: tuple[EditParameters, ...]
    coefficients: Tensor | None
    weights: Tensor | None
    learned: str | None = None

    @classmethod
    def of(cls, basis: Basis | DirectionPath, parameters: Sequence[EditParameters]) -> EditBatch:
        """Select the directions of edits once, for all writers."""
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
    """Say that there are no learned directions.

    Raises:
        ValueError: Always.
    """
    raise ValueError(f"there are no learned directions {name[:12]}")


def split_batches(
    basis: Basis, parameters: Sequence[EditParameters], learned: Callable[[str], DirectionPath] = no_directions
) -> tuple[list[EditBatch], Tensor]:
    """Split edits into those of one direction everywhere, those of each layer's own, and those of learned directions.

    Args:
        basis: The directions of all layers.
        parameters: The edits.
        learned: Returns learned directions by their name.

    Returns:
        The batches, and where each edit is in them as they follow one another, [K].
    """
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
    """Compile an edit for one writer, as files need it: nothing has leading dimensions.

    Args:
        writer: The writer.
        basis: The directions of all layers or those that were learned, with which the writer was prepared.
        parameters: The edit.
    """
    return compile_edits(WriterGroup.of(basis, [writer]), EditBatch.of(basis, [parameters])).first()


def compile_edits(group: WriterGroup, batch: EditBatch) -> WriterEdit:
    """Compile K edits for S writers, as hooks need them: leading dimensions are [S, K].

    What all writers read in common has no S, [K, k, d]; what all edits read in common is [S, 1, k, d].
    """
    if batch.coefficients is not None:
        coefficients = _orthonormal_before_norms(batch.coefficients, group.gram)
        projections, weights = project(group.products, group.candidates, coefficients), batch.weights
    else:
        assert group.own is not None  # a batch and its group are of the same directions
        projections, weights = group.own, group.own_weights
    assert weights is not None
    return ablate(group.products, projections, strengths(group.writers, batch.parameters, weights))


def _orthonormal_before_norms(coefficients: Tensor, gram: Tensor | None) -> Tensor:
    """Return combinations, orthonormal in the stream, made so before the norms of writers that have any."""
    return coefficients if gram is None else orthonormal_in(coefficients, gram)


def strengths(writers: Sequence[Writer], parameters: Sequence[EditParameters], weights: Tensor) -> Tensor:
    """Return λ of every writer, edit and direction, [S, K, k], float64, on the CPU.

    Strengths by layer are λ itself. A kernel's strength at the writer's layer, times the edit's share for the
    direction, is multiplied with the direction's weight.

    Args:
        writers: S writers.
        parameters: K edits.
        weights: Weights of the directions, [K, k] or [S, 1, k].
    """
    layers = max(writer.layer for writer in writers) + 1
    by_layer = [edit.strengths_by_layer(layers) for edit in parameters]
    given = [[edit[writer.component][writer.layer] for edit in by_layer] for writer in writers]
    by_kernel = torch.tensor([edit.layer_strengths is None for edit in parameters])
    return torch.tensor(given, dtype=torch.float64) * torch.where(by_kernel[:, None], weights, 1.0)
