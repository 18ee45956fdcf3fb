"""What edits do to residual writers, in numbers that hooks apply: worked out for several writers at once.

A writer by itself is little work and many small steps, of which a GPU would do one after the other. Those of one
shape on one device are therefore taken together, some at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from job.architectures.spec import Writer
from job.numerics.ablation import (
    OutputEdit,
    RowNormalization,
    WeightProjections,
    WeightTables,
    aim,
    edit_along,
    stacked,
    weight_tables,
)
from job.numerics.basis import Basis, orthonormal_in
from job.numerics.weight_kernel import WeightKernel
from job.records import EditParameters

# Writers that are taken together at most: what is worked out for them is to fit into a processor's caches, and tables
# are copied once as they are put together.
_TOGETHER = 16


class Split(NamedTuple):
    """A batch of K edits, in the order of the tables: those of one direction everywhere first."""

    everywhere: list[EditParameters]
    own: list[EditParameters]
    # Where each edit of the batch is, [K].
    slots: Tensor

    @classmethod
    def of(cls, edits: Sequence[EditParameters]) -> Split:
        """Split a batch by whether all layers' writers lose the same directions, or each its own layer's."""
        order = sorted(range(len(edits)), key=lambda number: edits[number].direction_index is None)
        slots = torch.empty(len(edits), dtype=torch.long)
        slots[order] = torch.arange(len(edits))
        own = [edit for edit in edits if edit.direction_index is None]
        return cls([edit for edit in edits if edit.direction_index is not None], own, slots)


@dataclass(frozen=True)
class HookTables:
    """K edits of k directions on a writer, all float32.

    Attributes:
        read: What outputs are measured along, [d, K * k].
        write: What is taken out of outputs for each of those measures, [K * k, d].
        output_scale: Factor per output, [K, d] or None.
        input_scale: Factor per input, [K, i] or None.
    """

    read: Tensor
    write: Tensor
    output_scale: Tensor | None
    input_scale: Tensor | None


class WriterGroup:
    """Writers of one shape on one device, all or none of them with norms between them and the stream.

    Attributes:
        writers: The writers.
    """

    def __init__(
        self, writers: Sequence[Writer], basis: Basis, candidates: Sequence[Tensor], tables: Sequence[WeightTables]
    ) -> None:
        """Put the tables of writers together.

        Args:
            writers: The writers.
            basis: The directions of all layers.
            candidates: The basis' candidates as each writer has them, [m, d] float64, where its weight is.
            tables: Each writer's.
        """
        self.writers = writers
        self._basis, self._tables = basis, stacked(tables)
        self._candidates = torch.stack(list(candidates))[:, None] if writers[0].post_norms else candidates[0]
        self._gram = gram_of(writers[0], self._candidates)
        self._own: tuple[WeightProjections, Tensor] | None = None

    def activate(self, split: Split) -> tuple[list[HookTables], Tensor, Tensor]:
        """Work edits out.

        Returns:
            What they do to each writer; which edits are finite, [K]; and the least share that each leaves of the norms
            that it restores, [S, K]. All in the order of the tables.
        """
        parts, finite = [], []
        for aimed, strengths in self._aimed(split):
            # Beyond float32 an edit would be NaN to all rows, since all are multiplied with its tables.
            known = strengths.to(torch.float32).isfinite().all(-1)  # [S, K]
            finite.append(known.all(0))
            parts.append(edit_along(self._tables, aimed, torch.where(known[..., None], strengths, 0.0)))
        shares = torch.cat([part.least_share for part in parts], 1)
        return self._active(parts), torch.cat(finite), shares

    def _aimed(self, split: Split) -> Iterator[tuple[WeightProjections, Tensor]]:
        """Yield the directions of the edits and their λ, [S, K, k]: first those of one direction everywhere."""
        if split.everywhere:
            selected = [self._basis.select(edit.direction_index, 0) for edit in split.everywhere]
            coefficients, weights = map(torch.stack, zip(*selected, strict=True))  # [K, k, m], [K, k]
            yield self._aim(coefficients), self._strengths(split.everywhere, weights)
        if split.own:
            if self._own is None:  # they are always the same
                selected = [self._basis.select(None, writer.layer) for writer in self.writers]
                coefficients, weights = map(torch.stack, zip(*selected, strict=True))
                self._own = self._aim(coefficients[:, None]), weights[:, None]  # of [S, 1, k, m]; [S, 1, k]
            yield self._own[0], self._strengths(split.own, self._own[1])

    def _aim(self, coefficients: Tensor) -> WeightProjections:
        return aim(self._tables, self._candidates, orthonormal_before_norms(coefficients, self._gram))

    def _strengths(self, edits: Sequence[EditParameters], weights: Tensor) -> Tensor:
        """Return λ of edits, [S, K, k], for directions of these weights, [K, k] or [S, 1, k]."""
        own = [[strength(edit, writer) for edit in edits] for writer in self.writers]
        shares = torch.tensor([edit.strengths for edit in edits], dtype=torch.float64)  # [K, k]
        return torch.tensor(own, dtype=torch.float64)[..., None] * shares * weights

    def _active(self, parts: Sequence[OutputEdit]) -> list[HookTables]:
        """Return the tables of each writer, with all edits beside one another."""
        count = len(self.writers)
        # Each layer's own directions are there once for all edits.
        reads = [part.read.expand(*part.read.shape[:-3], part.write.shape[-3], -1, -1) for part in parts]
        read = _beside(reads, 4).transpose(1, 2).flatten(2).contiguous()
        write = _beside([part.write for part in parts], 4).mT.flatten(1, 2).contiguous()
        outputs = [part.output_scale for part in parts if part.output_scale is not None]
        inputs = [part.input_scale for part in parts if part.input_scale is not None]
        none = [None] * count
        return [
            HookTables(*tables)
            for tables in zip(
                read.expand(count, -1, -1).unbind(),
                write.unbind(),
                _beside(outputs, 3).unbind() if outputs else none,
                _beside(inputs, 3).unbind() if inputs else none,
                strict=True,
            )
        ]


class Grouping:
    """Puts writers into groups as they come."""

    def __init__(self, basis: Basis, mode: RowNormalization) -> None:
        self._basis, self._mode = basis, mode
        self._waiting: dict[object, list[tuple[Writer, Tensor, WeightTables]]] = {}
        self._groups: list[WriterGroup] = []

    def add(self, writer: Writer, candidates: Tensor, weight: Tensor | None) -> None:
        """Take a writer in.

        Args:
            writer: The writer.
            candidates: The basis' candidates as the writer has them, [m, d] float64, where its weight is.
            weight: Its weight, [d, i]; None if the mode needs none.
        """
        tables = WeightTables(self._mode) if weight is None else weight_tables(weight, candidates, self._mode)
        shape = None if weight is None else weight.shape
        alike = self._waiting.setdefault((bool(writer.post_norms), candidates.device, shape), [])
        alike.append((writer, candidates, tables))
        if len(alike) == _TOGETHER:
            self._close(alike)

    def groups(self) -> list[WriterGroup]:
        """Return all groups."""
        for alike in self._waiting.values():
            self._close(alike)
        return self._groups

    def _close(self, alike: list[tuple[Writer, Tensor, WeightTables]]) -> None:
        if alike:
            writers, candidates, tables = zip(*alike, strict=True)
            alike.clear()
            self._groups.append(WriterGroup(writers, self._basis, candidates, tables))


def _beside(tables: Sequence[Tensor], dimensions: int) -> Tensor:
    """Return tables of edits [S or 1, K', ...] beside one another, float32; those without S are for all writers."""
    filled = [table.to(torch.float32) for table in tables]
    filled = [table if table.dim() == dimensions else table[None] for table in filled]
    count = max(map(len, filled))
    return torch.cat([table.expand(count, *table.shape[1:]) for table in filled], 1) if len(filled) > 1 else filled[0]


def gram_of(writer: Writer, candidates: Tensor) -> Tensor | None:
    """Return the products of candidates [..., m, d] with one another, None for writers that have the basis' own."""
    return (candidates @ candidates.mT).to("cpu", torch.float64) if writer.post_norms else None


def directions_and_strengths(
    edit: EditParameters, basis: Basis, writer: Writer, gram: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return what an edit ablates from a writer.

    Args:
        edit: The edit.
        basis: The directions of all layers.
        writer: The writer.
        gram: What `gram_of` returns for it.

    Returns:
        Orthonormal combinations of the writer's candidates, [k, m], and their λ, [k].
    """
    coefficients, weights = basis.select(edit.direction_index, writer.layer)
    shares = torch.tensor(edit.strengths, dtype=torch.float64)
    return orthonormal_before_norms(coefficients, gram), strength(edit, writer) * shares * weights


def orthonormal_before_norms(coefficients: Tensor, gram: Tensor | None) -> Tensor:
    """Return combinations that are orthonormal in the stream made so where `gram_of` returns this."""
    return coefficients if gram is None else orthonormal_in(coefficients, gram)


def strength(edit: EditParameters, writer: Writer) -> float:
    """Return an edit's own λ for a writer, to which the directions' shares and weights apply."""
    kernel = edit.kernels[writer.component]
    return WeightKernel(
        max_weight=kernel.max_weight,
        max_weight_position=kernel.max_weight_position,
        min_weight=kernel.min_weight,
        min_weight_distance=kernel.min_weight_distance,
    ).strength(writer.layer)
