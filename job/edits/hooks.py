"""Edits of a model as forward hooks: no weight is read or written during the search.

Rows of one batch may belong to different trials: each row carries the index of its trial into tables
of K edits, so that many trials are evaluated in one forward. An output is measured along the directions
of all trials at once and other trials' measures are set to 0: two matrix products, with no table copied
for a row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from job.architectures.spec import Architecture
from job.edits.compile import (
    EditBatch,
    PreparedWriter,
    WriterGroup,
    compile_edits,
    group_writers,
    no_directions,
    split_batches,
)
from job.model.placement import module_device, read_parameter
from job.numerics.ablation import DEGENERATE_SHARE, RowNormalization, WriterEdit
from job.numerics.basis import Basis, DirectionPath
from job.records import EditParameters


@dataclass(frozen=True)
class HookTables:
    """K edits of k directions as the hooks of one writer apply them, all float32.

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

    @classmethod
    def of(cls, batches: Sequence[WriterEdit], count: int) -> list[HookTables]:
        """Return the tables of `count` writers from their compiled edits; batches follow one another."""
        reads = []
        for batch in batches:  # what all edits of a batch read in common is repeated for each
            read = batch.output_read
            reads.append(read.expand(*read.shape[:-3], batch.write.shape[-3], -1, -1))
        read = _concatenate(reads, 4).flatten(1, 2).mT.contiguous()
        write = _concatenate([batch.output_write for batch in batches], 4).flatten(1, 2).contiguous()
        outputs = [batch.output_scale for batch in batches if batch.output_scale is not None]
        inputs = [batch.input_scale for batch in batches if batch.input_scale is not None]
        none = [None] * count
        tables = zip(
            read.expand(count, -1, -1).unbind(),
            write.unbind(),
            _concatenate(outputs, 3).unbind() if outputs else none,
            _concatenate(inputs, 3).unbind() if inputs else none,
            strict=True,
        )
        return [cls(*one) for one in tables]


def _concatenate(tables: Sequence[Tensor], dimensions: int) -> Tensor:
    """Return tables of edits [S or 1, K', ...] one after the other, float32; those without S are for all writers."""
    filled = [table.to(torch.float32) for table in tables]
    filled = [table if table.dim() == dimensions else table[None] for table in filled]
    count = max(map(len, filled))
    return torch.cat([table.expand(count, *table.shape[1:]) for table in filled], 1) if len(filled) > 1 else filled[0]


@dataclass
class _Site:
    """A residual writer's module and the tables of the edits that are active on it."""

    module: nn.Module
    tables: HookTables | None = None


class ActiveEdits:
    """Edits 0 … K-1, ready to be applied; the rows of a forward name theirs by number.

    Attributes:
        reasons: For each edit why it is degenerate and must not be scored, None if it is not.
    """

    def __init__(self, hooks: Intervention, slots: Tensor, finite: Tensor, reasons: Sequence[str | None]) -> None:
        """Keep where each edit is in the tables.

        Args:
            hooks: The hooks that apply the edits.
            slots: Each edit's place in the tables, [K].
            finite: Which edits float32 can hold, [K], in the tables' order.
            reasons: Why each edit is degenerate.
        """
        self.reasons = tuple(reasons)
        self._hooks, self._slots = hooks, slots
        # The rows of an edit beyond float32 are made NaN.
        self._factors = torch.where(finite, 1.0, torch.nan)
        self._on: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def bind(self, trials: Tensor) -> EditedRows:
        """Return a context in which row i of every forward gets edit `trials[i]`, [rows]."""
        return EditedRows(self._hooks, self, trials)

    def all_rows(self, count: int, device: torch.device | str) -> EditedRows:
        """Return a context in which each of `count` rows gets edit 0."""
        return self.bind(torch.zeros(count, dtype=torch.long, device=device))

    @contextmanager
    def on_every_row(self, model: nn.Module) -> Iterator[None]:
        """Give edit 0 to every row of every forward in the block, whoever calls the model."""
        bound: list[EditedRows] = []

        def enter(_module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
            given = inputs[0] if inputs else named.get("input_ids")
            given = named["inputs_embeds"] if given is None else given
            bound.append(self.all_rows(len(given), given.device))
            bound[-1].__enter__()

        def leave(*_: Any) -> None:
            while bound:
                bound.pop().__exit__()

        handles = [
            model.register_forward_pre_hook(enter, with_kwargs=True),
            model.register_forward_hook(leave, always_call=True),
        ]
        try:
            yield
        finally:
            leave()
            for handle in handles:
                handle.remove()

    def places(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return each edit's place in the tables and each place's factor, both [K], on a device."""
        if device not in self._on:
            self._on[device] = self._slots.to(device), self._factors.to(device)
        return self._on[device]


class EditedRows:
    """A context in which the rows of every forward get their edits; it can be entered again."""

    def __init__(self, hooks: Intervention, edits: ActiveEdits, trials: Tensor) -> None:
        self._hooks, self._edits, self._trials = hooks, edits, trials
        self._on: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def __enter__(self) -> Self:
        self._hooks.enter(self, self._edits)
        return self

    def __exit__(self, *_: object) -> None:
        self._hooks.leave(self)

    def __len__(self) -> int:
        return len(self._trials)

    def on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return each row's place in the tables, [rows], and its factor for every place, [rows, 1, K, 1].

        The factors of other trials' edits are 0.
        """
        if device not in self._on:
            slots, factors = self._edits.places(device)
            rows = slots[self._trials.to(device)]
            own = nn.functional.one_hot(rows, len(factors)).to(torch.bool)
            self._on[device] = rows, torch.where(own, factors, 0.0)[:, None, :, None]
        return self._on[device]


class Intervention:
    """Ablates directions from the outputs of all residual writers, row by row.

    Use as a context manager; the hooks are there within the block. They change nothing but the forwards within a
    context that `ActiveEdits.bind` returns.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        architecture: Architecture,
        basis: Basis,
        mode: RowNormalization,
        learned: Callable[[str], DirectionPath] = no_directions,
    ) -> None:
        """Read every writer's weight once.

        Args:
            model: The loaded model.
            architecture: Its structure.
            basis: The directions of all layers.
            mode: Which norms of the weights edits preserve; "none" if experts' weights are held together.
            learned: Returns the directions that edits name, of as many directions a layer as the basis has. Every
                weight is read once more when an edit is the first to name them.
        """
        self._mode, self._basis = mode, basis
        self._model, self._architecture, self._learned = model, architecture, learned
        self._sites: dict[str, _Site] = {}
        self._groups = list(group_writers(basis, self._prepared(basis)))
        # Groups are the same writers in the same order, whatever directions they are prepared with.
        self._paths: dict[str, tuple[DirectionPath, list[WriterGroup]]] = {}
        self._handles: list[RemovableHandle] = []
        self._active: ActiveEdits | None = None
        self._bound: EditedRows | None = None

    def _prepared(self, basis: Basis | DirectionPath) -> Iterator[PreparedWriter]:
        """Yield the writers that hooks edit, with the products of their weights, and note their modules."""
        model = self._model
        on_device: dict[tuple[torch.device, int], Tensor] = {}
        hooked: set[str] = set()
        for writer in self._architecture.writers:
            if writer.hook and writer.hook in hooked:
                continue
            hooked.add(writer.hook)
            self._sites.setdefault(writer.parameter, _Site(model.get_submodule(writer.hooked)))
            device = module_device(model.get_submodule(writer.module))
            place = (device, writer.layer if isinstance(basis, DirectionPath) else 0)
            if place not in on_device:
                on_device[place] = basis.candidates_of(writer.layer).to(device, torch.float64)
            candidates = writer.pull_back(on_device[place], partial(read_parameter, model))
            if self._mode != "none" and writer.summed:
                raise ValueError(f"{self._mode} is not defined for {writer.parameter}")
            weight = None if self._mode == "none" else writer.matrix(read_parameter(model, writer.parameter))
            yield PreparedWriter.of(writer, candidates, weight, self._mode)

    def _path(self, name: str) -> DirectionPath:
        """Return learned directions, with their products at hand."""
        if name not in self._paths:
            path = self._learned(name)
            if (path.layers, path.size) != (self._basis.layers, self._basis.size):
                raise ValueError(f"{path.size} directions in {path.layers} layers are not those of this job")
            self._paths[name] = path, list(group_writers(path, self._prepared(path)))
        return self._paths[name][0]

    def __enter__(self) -> Self:
        for site in self._sites.values():
            if self._mode == "column":
                self._handles.append(site.module.register_forward_pre_hook(self._scale_input(site)))
            self._handles.append(site.module.register_forward_hook(self._edit_output(site)))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._bound = None

    def activate(self, edits: Sequence[EditParameters]) -> ActiveEdits:
        """Compile edits; those of an earlier call can no longer be applied, for their tables' memory is used again."""
        if self._bound is not None:
            raise RuntimeError("a forward is being edited")
        self._active = None
        batches, slots = split_batches(self._basis, edits, self._path)
        applied = [self._apply(number, batches) for number in range(len(self._groups))]
        finite = torch.stack([known for known, _ in applied]).all(0)
        self._active = ActiveEdits(self, slots, finite, self._degenerate([share for _, share in applied], slots))
        return self._active

    def _apply(self, number: int, batches: Sequence[EditBatch]) -> tuple[Tensor, Tensor]:
        """Set the tables of a group's writers; return which edits are finite, [K], and the least shares, [S, K]."""
        group = self._groups[number]
        compiled = [
            compile_edits(group if batch.learned is None else self._paths[batch.learned][1][number], batch)
            for batch in batches
        ]
        for writer, tables in zip(group.writers, HookTables.of(compiled, len(group.writers)), strict=True):
            self._sites[writer.parameter].tables = tables
        finite = torch.cat([edit.finite.all(0) for edit in compiled])
        return finite, torch.cat([edit.least_share for edit in compiled], 1)

    def _degenerate(self, shares: Sequence[Tensor], slots: Tensor) -> list[str | None]:
        """Return for each edit why it is degenerate, from the least shares [S, K] of all groups."""
        reasons: list[str | None] = [None] * len(slots)
        if self._mode in ("none", "pre"):
            return reasons
        # Looked at once all has been asked for: a GPU is waited for once and not at every writer.
        for group, share in zip(self._groups, shares, strict=True):
            low = (share < DEGENERATE_SHARE).cpu()[:, slots]
            for writer, number in low.nonzero().tolist():
                parameter = group.writers[writer].parameter
                reasons[number] = f"the edit leaves nothing to restore a norm from in {parameter}"
        return reasons

    def enter(self, rows: EditedRows, edits: ActiveEdits) -> None:
        """Apply edits to the rows of the forwards to come; `EditedRows` alone calls this.

        Raises:
            RuntimeError: Other edits are active now, or other rows are bound.
        """
        if edits is not self._active:
            raise RuntimeError("other edits have been activated since")
        if self._bound is not None:
            raise RuntimeError("rows of another forward are bound")
        self._bound = rows

    def leave(self, rows: EditedRows) -> None:
        """Apply edits no longer; `EditedRows` alone calls this."""
        if self._bound is rows:
            self._bound = None

    def _scale_input(self, site: _Site) -> Any:
        def hook(_module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
            if self._bound is None or site.tables is None or site.tables.input_scale is None:
                return None
            x = inputs[0]
            scale = site.tables.input_scale[self._bound.on(x.device)[0]]  # [rows, i]
            scaled = _by_rows(x, len(scale)).to(torch.float32) * scale[:, None]
            return (scaled.to(x.dtype).view_as(x), *inputs[1:])

        return hook

    def _edit_output(self, site: _Site) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> Any:
            if self._bound is None or site.tables is None:
                return None
            if isinstance(output, tuple):  # what adds experts up may also tell how they were chosen
                return (_edited(output[0], site.tables, self._bound), *output[1:])
            return _edited(output, site.tables, self._bound)

        return hook


def _edited(y: Tensor, edits: HookTables, bound: EditedRows) -> Tensor:
    """Return a writer's output [rows, t, d], or [rows * t, d], with each row's edit applied."""
    rows, own = bound.on(y.device)
    stream = y.reshape(-1, y.shape[-1]).to(torch.float32)
    along = stream @ edits.read  # [rows * t, K * k]
    along.view(len(rows), -1, own.shape[2], edits.read.shape[1] // own.shape[2]).mul_(own)
    edited = torch.addmm(stream, along, edits.write, alpha=-1)
    if edits.output_scale is not None:
        _by_rows(edited, len(rows)).mul_(edits.output_scale[rows][:, None])
    return edited.to(y.dtype).view_as(y)


def _by_rows(tensor: Tensor, rows: int) -> Tensor:
    """Return values as [rows, t, d], also those of modules that see all rows' positions in one line."""
    return tensor.reshape(rows, -1, tensor.shape[-1])
