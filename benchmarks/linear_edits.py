"""Linear edits beyond the product's, as hooks: co-vectors, cleaned directions, masked layers and norm modes searched.

Each is prototyped on the pieces of a job, in one process: residuals, hooks, scorer and search. A method is a set of
choices; a choice with several values is a parameter of the search. What wins is worth building into the product; see
docs/lab-notes/directions.md.

An oblique edit is y' = y - λ a (b·y), b·a = 1. Of all reads b, a co-vector changes the model's outputs to good prompts
least: b ~ (S + ρI)⁻¹a with S their second moments. This is what ridge regression leaves of a.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from torch import Tensor, nn

from job.architectures.spec import Writer
from job.edits.compile import EditBatch, WriterGroup, _orthonormal_before_norms, strengths
from job.edits.hooks import HookTables, Intervention
from job.model.loading import LoadedModel
from job.model.placement import read_parameter
from job.numerics.ablation import (
    RowNormalization,
    WriterEdit,
    _column_scale,
    _row_scale,
    project,
    stack_products,
    weight_products,
)
from job.numerics.basis import Basis
from job.records import EditParameters


@dataclass(frozen=True)
class Choices:
    """A method; several values of a choice are searched.

    Attributes:
        norms: Norms of weights that are kept.
        reads: What is read: "same" as written, or "space positions ridge". It is the co-vector by the "stream" or the
            writer's own "outputs", at the "last" positions of good prompts, these less their mean ("centred"), or all
            positions of prompts and responses ("text"). "soft" is "stream", written as well. The ridge is relative to
            the mean square.
        keeps: What directions are cleaned of: "nothing"; "share:s", the good prompts' first principal components with
            that share of the variance; "tasks", the differences between an organism's tasks.
        masks: What decides where an edit acts, by a searched threshold of the AUC by which projections on held-out
            prompts tell the classes apart: "none", "stream" or "outputs".
    """

    norms: tuple[RowNormalization, ...] = ("none",)
    reads: tuple[str, ...] = ("same",)
    keeps: tuple[str, ...] = ("nothing",)
    masks: tuple[str, ...] = ("none",)

    @property
    def searched(self) -> dict[str, BaseDistribution]:
        """The method's own parameters of the search."""
        found: dict[str, BaseDistribution] = {
            name: CategoricalDistribution(values) for name, values in vars(self).items() if len(values) > 1
        }
        if self.masks != ("none",):
            found["threshold"] = FloatDistribution(0.5, 1.0)
        return found

    def of(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """Return a trial's choices."""
        return {name: params.get(name, values[0]) for name, values in vars(self).items()}


LINEAR = {
    "default": Choices(),
    "norms pre": Choices(norms=("pre",)),
    "norms full": Choices(norms=("full",)),
    "norms column": Choices(norms=("column",)),
    "co-vector of the stream, 0.01": Choices(reads=("stream last 0.01",)),
    "co-vector of the stream, 0.1": Choices(reads=("stream last 0.1",)),
    "co-vector of the stream, 1": Choices(reads=("stream last 1",)),
    "co-vector of outputs, 0.01": Choices(reads=("outputs last 0.01",)),
    "co-vector of outputs, 0.1": Choices(reads=("outputs last 0.1",)),
    "co-vector of outputs, 1": Choices(reads=("outputs last 1",)),
    "co-vector of outputs about their mean, 0.1": Choices(reads=("outputs centred 0.1",)),
    "direction cleaned by ridge, 1": Choices(reads=("soft last 1",)),
    "cleaned of 50 %": Choices(keeps=("share:0.5",)),
    "cleaned of 90 %": Choices(keeps=("share:0.9",)),
    "cleaned of tasks": Choices(keeps=("tasks",)),
    "mask by the stream": Choices(masks=("stream",)),
    "mask by outputs": Choices(masks=("outputs",)),
    "co-vector of the stream's text, 0.01": Choices(reads=("stream text 0.01",)),
    "co-vector of the stream's text, 0.1": Choices(reads=("stream text 0.1",)),
    "co-vector of the stream's text, 1": Choices(reads=("stream text 1",)),
    "co-vector of the outputs' text, 0.1": Choices(reads=("outputs text 0.1",)),
    "co-vector of the outputs' text, 1": Choices(reads=("outputs text 1",)),
    "co-vector searched": Choices(reads=("same", "stream last 0.1")),
    "co-vector and mask": Choices(reads=("stream last 0.1",), masks=("outputs",)),
    "searched": Choices(
        norms=("none", "full"),
        reads=("same", "outputs last 0.1"),
        keeps=("nothing", "share:0.5"),
        masks=("none", "outputs"),
    ),
}


class ObliqueHooks(Intervention):
    """Hooks of edits that read other directions than they write.

    One direction a layer. A writer is edited if its AUC reaches the edit's own of `thresholds`, by identity.
    """

    def __init__(
        self, loaded: LoadedModel, basis: Basis, mode: RowNormalization, found: Measures, choice: Mapping[str, str]
    ) -> None:
        """Compute every writer's reads and writes, and their products with its weight."""
        super().__init__(loaded.model, loaded.architecture, basis, mode)
        self.thresholds: dict[int, float] = {}
        self._auc = found.auc.get(choice["masks"], {})
        self._oblique: list[tuple[WriterGroup, Tensor]] = []
        for group in self._groups:
            shape = (len(group.writers), 1, *group.candidates.shape[-2:])
            written = group.candidates.expand(shape)
            if group.products.metric is not None:
                written = written * group.products.metric[..., None, :]
            reads, products = [], []
            for writer, candidates, writes in zip(group.writers, group.candidates.expand(shape), written, strict=True):
                weight = None if mode == "none" else writer.matrix(read_parameter(loaded.model, writer.parameter))
                read, write = candidates[0], writes[0]
                unit = weight if mode in ("pre", "full") else None
                if choice["reads"] != "same":
                    read, write = found.covectors(choice["reads"], loaded, writer, basis.candidates, write, unit)
                one = weight_products(read if weight is None else weight, read, mode)
                if mode == "column" and weight is not None:
                    one = replace(one, column_writes=write @ weight.to(write))
                reads.append(torch.cat([read, write]))
                products.append(one)
            both = torch.stack(reads)[:, None]
            count = shape[2]
            changed = replace(group, candidates=both[..., :count, :], products=stack_products(products))
            self._oblique.append((changed, both[..., count:, :]))

    def _apply(self, number: int, batches: Sequence[EditBatch]) -> tuple[Tensor, Tensor]:
        compiled = [self._compiled(number, batch) for batch in batches]
        writers = self._groups[number].writers
        for writer, tables in zip(writers, HookTables.of(compiled, len(writers)), strict=True):
            self._sites[writer.parameter].tables = tables
        finite = torch.cat([edit.finite.all(0) for edit in compiled])
        return finite, torch.cat([edit.least_share for edit in compiled], 1)

    def _compiled(self, number: int, batch: EditBatch) -> WriterEdit:
        group, written = self._oblique[number]
        if batch.coefficients is None:
            own = [self._basis.select(None, writer.layer)[0] for writer in group.writers]
            coefficients = torch.stack(own)[:, None].expand(-1, len(batch.parameters), -1, -1)
        else:
            coefficients = batch.coefficients.expand(len(group.writers), -1, -1, -1)
        coefficients = _orthonormal_before_norms(coefficients, self._groups[number].gram, 1).to(written)
        read = project(group.products, group.candidates, coefficients)
        writes = coefficients @ written
        unit = 1 / (read.directions * writes).sum(-1, keepdim=True)  # the write is removed at λ = 1

        def scaled(table: Tensor | None) -> Tensor | None:
            return None if table is None else table * unit

        read = replace(
            read,
            directions=read.directions * unit,
            row_products=scaled(read.row_products),
            column_products=scaled(read.column_products),
        )
        ones = torch.ones(len(batch.parameters), 1, dtype=torch.float64)
        given = strengths(group.writers, batch.parameters, ones) * self._acts(group.writers, batch.parameters)
        write = given[..., None] * writes
        share, scale, inputs = torch.ones(write.shape[:2], dtype=torch.float64), None, None
        if self._mode == "full":
            scale, share = _row_scale(group.products, read, write)
        elif self._mode == "column":
            inputs, share = _column_scale(group.products, read, given, write)
        norms, inverses = group.products.row_norms, group.products.row_inverses
        finite = torch.ones(share.shape, dtype=torch.bool)
        return WriterEdit(read.directions, write, norms, inverses, scale, inputs, share, finite)

    def _acts(self, writers: Sequence[Writer], edits: Sequence[EditParameters]) -> Tensor:
        """Return where edits act, [S, K, 1]."""
        rows = [
            [self._auc.get((one.component, one.layer), 1.0) >= self.thresholds.get(id(edit), 0.0) for edit in edits]
            for one in writers
        ]
        return torch.tensor(rows, dtype=torch.float64)[..., None]


@dataclass
class Measures:
    """What a model's stream and writers hold at good prompts, and how well they tell the classes apart.

    Attributes:
        stream: Second moments of the stream after each layer, [layers, d, d], float64, by positions.
        outputs: The same of each writer's outputs, [d, d], by positions and parameter.
        auc: How well projections tell held-out prompts apart, by mask, component and layer.
    """

    stream: dict[str, Tensor] = field(default_factory=dict)
    outputs: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    auc: dict[str, dict[tuple[str, int], float]] = field(default_factory=lambda: defaultdict(dict))

    def covectors(
        self, how: str, loaded: LoadedModel, writer: Writer, candidates: Tensor, writes: Tensor, weight: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return reads and writes, both [m, d], before a writer's norms.

        `candidates` [m, d] are directions in the stream, one a layer; `weight` is given for modes with row norms.
        """
        space, positions, ridge = how.split(" ")
        if space == "outputs":
            moments = self.outputs[positions][writer.parameter]
            if weight is not None:
                norms = weight.double().norm(dim=1)
                moments = moments / torch.outer(norms, norms)
            return _covector(moments, writes, float(ridge)), writes
        each = zip(self.stream[positions], candidates.double(), strict=True)
        reads = torch.cat([_covector(moments, one[None], float(ridge)) for moments, one in each])
        read, metric = writer.pull_back(reads, partial(read_parameter, loaded.model))
        if space == "soft":
            return read, (read if metric is None else read * metric)
        return read, writes


def _covector(moments: Tensor, writes: Tensor, ridge: float) -> Tensor:
    """Return (S + ρI)⁻¹a for writes a [m, d], scaled to b·a = 1."""
    mean = moments.diagonal().mean()
    solved: Tensor = torch.linalg.solve(moments / mean + ridge * torch.eye(len(moments)).to(moments), writes.mT).mT
    return solved / (solved * writes).sum(-1, keepdim=True)


def auc(good: Tensor, bad: Tensor) -> float:
    """Return the probability that a bad prompt's projection exceeds a good one's, or the reverse if that is higher."""
    above = (bad[:, None] > good).double().mean() + 0.5 * (bad[:, None] == good).double().mean()
    return max(float(above), 1 - float(above))


@contextmanager
def writer_outputs(loaded: LoadedModel) -> Iterator[dict[str, list[Tensor]]]:
    """Keep what every writer writes in forwards of one prompt each, [t, d], by parameter."""
    kept: dict[str, list[Tensor]] = defaultdict(list)
    with ExitStack() as stack:
        hooked: set[str] = set()
        for writer in loaded.architecture.writers:
            if writer.hook and writer.hook in hooked:
                continue
            hooked.add(writer.hook)
            outside = writer.bias if writer.bias_outside else None
            bias = 0.0 if outside is None else read_parameter(loaded.model, outside).double()

            def keep(
                _module: nn.Module, _inputs: Any, output: Any, name: str = writer.parameter, bias: Any = bias
            ) -> None:
                output = output[0] if isinstance(output, tuple) else output
                kept[name].append(output.detach().reshape(-1, output.shape[-1]).double() + bias)

            stack.callback(loaded.model.get_submodule(writer.hooked).register_forward_hook(keep).remove)
        yield kept
