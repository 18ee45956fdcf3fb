"""Edits as forward hooks: the search neither reads nor writes weights.

Each row of a batch carries the index of its trial into tables of K edits, so one forward evaluates many trials. Outputs
are projected on all trials' directions at once and other trials' projections set to 0: two matrix products, no table
copied per row.
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
    """K edits of k directions for one writer's hooks, float32.

    Attributes:
        read: Directions along which outputs are measured, [d, K * k].
        write: What is subtracted per unit measured, [K * k, d].
        output_scale: Factor per output, [K, d] or None.
        input_scale: Factor per input, [K, i] or None.
    """

    read: Tensor
    write: Tensor
    output_scale: Tensor | None
    input_scale: Tensor | None

    @classmethod
    def of(cls, batches: Sequence[WriterEdit], count: int) -> list[HookTables]:
        """Return the tables of `count` writers from consecutive batches of compiled edits."""
        reads = []
        for batch in batches:  # repeat the tensors shared by all edits of a batch
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
        return [cls(*writer_tables) for writer_tables in tables]


def _concatenate(tables: Sequence[Tensor], dimensions: int) -> Tensor:
    """Concatenate tables of edits [S or 1, K', ...] in float32; those without S apply to all writers."""
    filled = [table.to(torch.float32) for table in tables]
    filled = [table if table.dim() == dimensions else table[None] for table in filled]
    count = max(map(len, filled))
    return torch.cat([table.expand(count, *table.shape[1:]) for table in filled], 1) if len(filled) > 1 else filled[0]


@dataclass
class _Site:
    module: nn.Module
    bias: Tensor | None = None  # if it is added after the module, [d], float32
    tables: HookTables | None = None


class ActiveEdits:
    """Edits 0 … K-1, compiled; the rows of a forward refer to them by index.

    `reasons` says per edit why it is degenerate and must not be scored, else None.
    """

    def __init__(self, hooks: Intervention, slots: Tensor, finite: Tensor, reasons: Sequence[str | None]) -> None:
        """Take each edit's slot in the tables, [K], and which slots float32 can hold, [K]."""
        self.reasons = tuple(reasons)
        self._hooks, self._slots = hooks, slots
        # Rows of an edit beyond float32 become NaN.
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
        """Apply edit 0 to every row of every forward in the block."""
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
        """Return each edit's slot and each slot's factor, both [K], on a device."""
        if device not in self._on:
            self._on[device] = self._slots.to(device), self._factors.to(device)
        return self._on[device]


class EditedRows:
    """A re-enterable context in which the rows of every forward get their edits."""

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
        """Return each row's slot, [rows], and its factor per slot, [rows, 1, K, 1]; 0 for other trials' slots."""
        if device not in self._on:
            slots, factors = self._edits.places(device)
            rows = slots[self._trials.to(device)]
            own_slot = nn.functional.one_hot(rows, len(factors)).to(torch.bool)
            self._on[device] = rows, torch.where(own_slot, factors, 0.0)[:, None, :, None]
        return self._on[device]


class Intervention:
    """Hooks that ablate directions from the outputs of all residual writers, row by row.

    A context manager that owns the hooks. They act only within a context of `ActiveEdits.bind`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        architecture: Architecture,
        basis: Basis,
        mode: RowNormalization,
        learned: Callable[[str], DirectionPath] = no_directions,
    ) -> None:
        """Read every writer's weight, again at first use of learned directions (`learned`, by name)."""
        self._mode, self._basis = mode, basis
        self._model, self._architecture, self._learned = model, architecture, learned
        self._sites: dict[str, _Site] = {}
        self._groups = list(group_writers(basis, self._prepared(basis)))
        # Groups hold the same writers in the same order for any directions.
        self._paths: dict[str, tuple[DirectionPath, list[WriterGroup]]] = {}
        self._handles: list[RemovableHandle] = []
        self._active: ActiveEdits | None = None
        self._bound: EditedRows | None = None

    def _prepared(self, basis: Basis | DirectionPath) -> Iterator[PreparedWriter]:
        model = self._model
        on_device: dict[tuple[torch.device, int], Tensor] = {}
        hooked: set[str] = set()
        for writer in self._architecture.writers:
            if writer.hook and writer.hook in hooked:
                continue
            hooked.add(writer.hook)
            bias = read_parameter(model, writer.bias).to(torch.float32) if writer.bias and writer.bias_outside else None
            self._sites.setdefault(writer.parameter, _Site(model.get_submodule(writer.hooked), bias))
            device = module_device(model.get_submodule(writer.module))
            key = (device, writer.layer if isinstance(basis, DirectionPath) else 0)
            if key not in on_device:
                on_device[key] = basis.candidates_of(writer.layer).to(device, torch.float64)
            candidates = writer.pull_back(on_device[key], partial(read_parameter, model))
            if self._mode != "none" and writer.summed:
                raise ValueError(f"{self._mode} is not defined for {writer.parameter}")
            weight = None if self._mode == "none" else writer.matrix(read_parameter(model, writer.parameter))
            yield PreparedWriter.of(writer, candidates, weight, self._mode)

    def _path(self, name: str) -> DirectionPath:
        """Return learned directions, with cached products."""
        if name not in self._paths:
            path = self._learned(name)
            if (path.layers, path.size) != (self._basis.layers, self._basis.size):
                raise ValueError(f"{path.size} directions in {path.layers} layers do not match this job's")
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
        """Compile edits. Those of an earlier call become invalid: their tables are reused."""
        if self._bound is not None:
            raise RuntimeError("an edited forward pass is still running")
        self._active = None
        batches, slots = split_batches(self._basis, edits, self._path)
        applied = [self._apply(number, batches) for number in range(len(self._groups))]
        finite = torch.stack([finite_edits for finite_edits, _ in applied]).all(0)
        self._active = ActiveEdits(self, slots, finite, self._degenerate([share for _, share in applied], slots))
        return self._active

    def _apply(self, number: int, batches: Sequence[EditBatch]) -> tuple[Tensor, Tensor]:
        """Fill the tables of a group's writers; return which edits are finite, [K], and the least shares, [S, K]."""
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
        """Return why each edit is degenerate, from the least shares [S, K] of all groups."""
        reasons: list[str | None] = [None] * len(slots)
        if self._mode in ("none", "pre"):
            return reasons
        # Read once all kernels are queued, to synchronise the GPU once rather than per writer.
        for group, share in zip(self._groups, shares, strict=True):
            low = (share < DEGENERATE_SHARE).cpu()[:, slots]
            for writer, number in low.nonzero().tolist():
                parameter = group.writers[writer].parameter
                reasons[number] = f"the edit leaves no output from which to restore a norm in {parameter}"
        return reasons

    def enter(self, rows: EditedRows, edits: ActiveEdits) -> None:
        """Apply edits to subsequent forwards, for `EditedRows`; RuntimeError if other edits or rows are active."""
        if edits is not self._active:
            raise RuntimeError("other edits are active now")
        if self._bound is not None:
            raise RuntimeError("the rows of another forward pass are bound")
        self._bound = rows

    def leave(self, rows: EditedRows) -> None:
        """Stop applying edits, for `EditedRows`."""
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
            if isinstance(output, tuple):  # experts may return their routing too
                return (_edited(output[0], site.tables, self._bound, site.bias), *output[1:])
            return _edited(output, site.tables, self._bound, site.bias)

        return hook


def _edited(y: Tensor, edits: HookTables, bound: EditedRows, bias: Tensor | None) -> Tensor:
    """Apply each row's edit to a writer's output [rows, t, d] or [rows * t, d], and to a bias added later, [d]."""
    rows, own_slot = bound.on(y.device)
    stream = y.reshape(-1, y.shape[-1]).to(torch.float32)
    stream = stream if bias is None else stream + bias
    along = stream @ edits.read  # [rows * t, K * k]
    along.view(len(rows), -1, own_slot.shape[2], edits.read.shape[1] // own_slot.shape[2]).mul_(own_slot)
    edited = torch.addmm(stream, along, edits.write, alpha=-1)
    if edits.output_scale is not None:
        _by_rows(edited, len(rows)).mul_(edits.output_scale[rows][:, None])
    edited = edited if bias is None else edited - bias
    return edited.to(y.dtype).view_as(y)


def _by_rows(tensor: Tensor, rows: int) -> Tensor:
    """Reshape values to [rows, t, d]; some modules see all rows' positions flattened."""
    return tensor.reshape(rows, -1, tensor.shape[-1])
