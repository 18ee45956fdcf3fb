"""Edits of a model as forward hooks: no weight is read or written during the search.

Rows of one batch may belong to different trials: each row carries the index of its trial into tables
of K edits, so that many trials are evaluated in one forward (DESIGN section 2). An output is measured
along the directions of all trials at once and what is not its own trial's is put to nothing: two matrix
products, with no table copied for a row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from job.architectures import Architecture
from job.edit_tables import Active, Grouping, Split
from job.numerics.ablation import DEGENERATE_SHARE, RowNormalization
from job.numerics.basis import Basis
from job.placement import module_device, read_parameter
from job.records import EditParameters


@dataclass
class _Site:
    """A residual writer's module and the edits that are active on it."""

    module: nn.Module
    active: Active | None = None


class Intervention:
    """Ablates directions from the outputs of all residual writers, row by row.

    Use as a context manager; the hooks are there within the block. Nothing is changed until `activate`
    has been given edits and `rows` says which row belongs to which of them.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        architecture: Architecture,
        basis: Basis,
        mode: RowNormalization,
    ) -> None:
        """Read every writer's weight once.

        Args:
            model: The loaded model.
            architecture: Its structure.
            basis: The directions of all layers.
            mode: Which norms of the weights edits preserve; "none" if experts' weights are held together.
        """
        self._mode = mode
        self._sites: dict[str, _Site] = {}
        on: dict[torch.device, Tensor] = {}
        grouping = Grouping(basis, mode)
        hooked: set[str] = set()
        for writer in architecture.writers:
            if writer.hook and writer.hook in hooked:
                continue
            hooked.add(writer.hook)
            self._sites[writer.parameter] = _Site(model.get_submodule(writer.hooked))
            device = module_device(model.get_submodule(writer.module))
            if device not in on:
                on[device] = basis.candidates.to(device, torch.float64)
            candidates = writer.candidates(on[device], partial(read_parameter, model))
            if mode != "none" and writer.summed:
                raise ValueError(f"{mode} is not defined for {writer.parameter}")
            weight = None if mode == "none" else writer.matrix(read_parameter(model, writer.parameter))
            grouping.add(writer, candidates, weight)
        self._groups = grouping.groups()
        self._handles: list[RemovableHandle] = []
        self._factors = torch.zeros(0)  # [K], as the tables
        self._slots = torch.zeros(0, dtype=torch.long)  # where each edit is in the tables, [K]
        self._rows: Tensor | None = None
        self._order: dict[torch.device, tuple[Tensor, Tensor]] = {}
        self._picked: dict[torch.device, tuple[Tensor, Tensor]] = {}

    @property
    def rows(self) -> Tensor | None:
        """The edit of every row of the next forward, [rows]; None: the model as it is."""
        return self._rows

    @rows.setter
    def rows(self, rows: Tensor | None) -> None:
        self._rows = rows
        self._picked.clear()

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
        self.rows = None

    def activate(self, edits: Sequence[EditParameters]) -> list[str | None]:
        """Make edits 0 … K-1 the ones that `rows` refers to.

        Returns:
            For each edit the reason why it is degenerate and must not be scored, None if it is not.
        """
        self._order.clear()
        self._picked.clear()
        split = Split.of(edits)
        finite = torch.ones(len(edits), dtype=torch.bool)
        shares = []
        for group in self._groups:
            active, known, least = group.activate(split)
            for writer, tables in zip(group.writers, active, strict=True):
                self._sites[writer.parameter].active = tables
            finite &= known
            shares.append(least)
        self._slots = split.slots
        self._factors = torch.where(finite, 1.0, torch.nan)
        return self._degenerate(shares)

    def _degenerate(self, shares: Sequence[Tensor]) -> list[str | None]:
        """Return for each edit why it is degenerate, from the least shares that all groups have said."""
        reasons: list[str | None] = [None] * len(self._slots)
        # Looked at once all has been asked for: a GPU is waited for once and not at every writer.
        for group, share in zip(self._groups, shares, strict=True):
            if self._mode in ("none", "pre"):
                break
            low = (share < DEGENERATE_SHARE).cpu()[:, self._slots]
            for writer, number in low.nonzero().tolist():
                parameter = group.writers[writer].parameter
                reasons[number] = f"the edit leaves nothing to restore a norm from in {parameter}"
        return reasons

    @contextmanager
    def on_every_row(self, model: nn.Module) -> Iterator[None]:
        """Within the block edit 0 is every row's, whoever calls the model and with however many rows."""

        def enter(_module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
            given = inputs[0] if inputs else named.get("input_ids")
            given = named["inputs_embeds"] if given is None else given
            self.rows = torch.zeros(len(given), dtype=torch.long, device=given.device)

        handle = model.register_forward_pre_hook(enter, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()
            self.rows = None

    def _rows_on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return each row's edit in the tables, [rows], and what measures along edits count for it, [rows, 1, K, 1].

        Both are on a device. The rows of an edit beyond float32 are made NaN.
        """
        assert self._rows is not None
        if device not in self._picked:
            if device not in self._order:
                self._order[device] = self._slots.to(device), self._factors.to(device)
            slots, factors = self._order[device]
            rows = slots[self._rows.to(device)]
            own = nn.functional.one_hot(rows, len(factors)).to(torch.bool)
            self._picked[device] = rows, torch.where(own, factors, 0.0)[:, None, :, None]
        return self._picked[device]

    def _scale_input(self, site: _Site) -> Any:
        def hook(_module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
            if self._rows is None or site.active is None or site.active.input_scale is None:
                return None
            x = inputs[0]
            scale = site.active.input_scale[self._rows_on(x.device)[0]]  # [rows, i]
            scaled = _by_rows(x, len(scale)).to(torch.float32) * scale[:, None]
            return (scaled.to(x.dtype).view_as(x), *inputs[1:])

        return hook

    def _edit_output(self, site: _Site) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> Any:
            if self._rows is None or site.active is None:
                return None
            if isinstance(output, tuple):  # what adds experts up may also tell how they were chosen
                return (self._edited(output[0], site.active), *output[1:])
            return self._edited(output, site.active)

        return hook

    def _edited(self, y: Tensor, edits: Active) -> Tensor:
        """Return a writer's output [rows, t, d], or [rows * t, d], as each row's edit leaves it."""
        rows, own = self._rows_on(y.device)
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
