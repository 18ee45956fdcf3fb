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

from job.architectures import Architecture, Writer
from job.numerics.ablation import (
    DEGENERATE_SHARE,
    OutputEdit,
    RowNormalization,
    WeightTables,
    output_edit,
    weight_tables,
)
from job.numerics.basis import Basis, orthonormal_in
from job.numerics.kernel import WeightKernel
from job.placement import module_device, read_parameter
from job.records import EditParameters


@dataclass(frozen=True)
class _Active:
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

    @classmethod
    def of(cls, edits: OutputEdit) -> _Active:
        """Put the tables of K edits beside one another."""
        return cls(
            read=edits.read.to(torch.float32).permute(1, 0, 2).flatten(1).contiguous(),
            write=edits.write.to(torch.float32).mT.flatten(0, 1).contiguous(),
            output_scale=_to_float32(edits.output_scale),
            input_scale=_to_float32(edits.input_scale),
        )


@dataclass
class _Site:
    """A residual writer with its tables and the edits that are active on it."""

    writer: Writer
    module: nn.Module
    tables: WeightTables
    candidates: Tensor  # [m, d] float64, where the weight is
    gram: Tensor | None  # [m, m] float64, on the CPU; None where norms between it and the stream do not matter
    active: _Active | None = None


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
        self._basis = basis
        self._mode = mode
        self._sites = []
        on: dict[torch.device, Tensor] = {}
        hooked: set[str] = set()
        for writer in architecture.writers:
            if writer.hook and writer.hook in hooked:
                continue
            hooked.add(writer.hook)
            module = model.get_submodule(writer.hooked)
            device = module_device(model.get_submodule(writer.module))
            if device not in on:
                on[device] = basis.candidates.to(device, torch.float64)
            candidates = writer.candidates(on[device], partial(read_parameter, model))
            if mode == "none":
                tables = WeightTables(mode)
            elif writer.summed:
                raise ValueError(f"{mode} is not defined for {writer.parameter}")
            else:
                tables = weight_tables(writer.matrix(read_parameter(model, writer.parameter)), candidates, mode)
            self._sites.append(_Site(writer, module, tables, candidates, gram_of(writer, candidates)))
        self._handles: list[RemovableHandle] = []
        self._factors = torch.zeros(0)  # [K]
        self._rows: Tensor | None = None
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
        for site in self._sites:
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
        self._factors = torch.ones(len(edits))
        self._picked.clear()
        shares = []
        for site in self._sites:
            parts = [directions_and_strengths(edit, self._basis, site.writer, site.gram) for edit in edits]
            coefficients = torch.stack([part[0] for part in parts])  # [K, k, m]
            strengths = self._finite(torch.stack([part[1] for part in parts]))  # [K, k]
            built = output_edit(site.tables, site.candidates, coefficients, strengths)
            site.active = _Active.of(built)
            shares.append(built.least_share)
        reasons: list[str | None] = [None] * len(edits)
        # Looked at once all has been asked for: a GPU is waited for once and not at every writer.
        for site, share in zip(self._sites, shares, strict=True):
            if self._mode in ("none", "pre"):
                break
            for index in (share < DEGENERATE_SHARE).nonzero().flatten().tolist():
                reasons[index] = f"the edit leaves nothing to restore a norm from in {site.writer.parameter}"
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

    def _finite(self, strengths: Tensor) -> Tensor:
        """Return strengths [K, k], those of an edit beyond float32 as 0, since all rows are multiplied with its tables.

        Its own rows are made NaN instead.
        """
        finite = strengths.to(torch.float32).isfinite().all(-1)
        self._factors[~finite] = torch.nan
        return torch.where(finite[:, None], strengths, 0.0)

    def _rows_on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return each row's edit, [rows], and what measures along edits count for it, [rows, 1, K, 1], on a device."""
        assert self._rows is not None
        if device not in self._picked:
            rows, factors = self._rows.to(device), self._factors.to(device)
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

    def _edited(self, y: Tensor, edits: _Active) -> Tensor:
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


def _to_float32(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.to(torch.float32)


def gram_of(writer: Writer, candidates: Tensor) -> Tensor | None:
    """Return the products of a writer's candidates [m, d] with one another, None where they are those of the basis."""
    return (candidates @ candidates.T).to("cpu", torch.float64) if writer.post_norms else None


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
    if gram is not None:  # what is orthonormal in the stream is not so before a norm
        coefficients = orthonormal_in(coefficients, gram)
    shares = torch.tensor(edit.strengths, dtype=torch.float64)
    return coefficients, strength(edit, writer) * shares * weights


def strength(edit: EditParameters, writer: Writer) -> float:
    """Return an edit's own λ for a writer, to which the directions' shares and weights apply."""
    kernel = edit.kernels[writer.component]
    return WeightKernel(
        max_weight=kernel.max_weight,
        max_weight_position=kernel.max_weight_position,
        min_weight=kernel.min_weight,
        min_weight_distance=kernel.min_weight_distance,
    ).strength(writer.layer)
