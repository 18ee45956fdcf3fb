"""Differentiable hooks for the strengths and directions of an edit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from job.architectures.spec import Writer
from job.model.loading import LoadedModel
from job.model.placement import module_device, read_parameter
from job.numerics.ablation import RowNormalization, WriterEdit
from job.numerics.gradient import EditVariables, orthonormal_rows, writer_edit
from job.records import COMPONENTS


@dataclass(frozen=True)
class _HookedWriter:
    writer: Writer
    module: nn.Module
    device: torch.device


class DifferentiableEdits:
    """Differentiable edits of all residual writers, row by row.

    They compute what `Intervention` does with compiled tables, in the same arithmetic, so an edit found here is the
    same there.
    """

    def __init__(self, loaded: LoadedModel, mode: RowNormalization, largest: float) -> None:
        """Find the modules to hook; `largest` is λ_max, and the model needs no gradients."""
        self._loaded, self._mode, self._largest = loaded, mode, largest
        self._writers: list[_HookedWriter] = []
        hooked: set[str] = set()
        model = loaded.model
        for writer in loaded.architecture.writers:
            if writer.hook and writer.hook in hooked:
                continue
            hooked.add(writer.hook)
            device = module_device(model.get_submodule(writer.module))
            self._writers.append(_HookedWriter(writer, model.get_submodule(writer.hooked), device))

    @contextmanager
    def applied(self, variables: EditVariables, trials: Sequence[int]) -> Iterator[None]:
        """Within the block, row i of every forward gets edit `trials[i]`; compute gradients within it too.

        If there is only one edit, forwards may have any number of rows.
        """
        strengths, directions = variables.strengths(self._largest), variables.orthonormal()
        rows = None if len(strengths) == 1 else torch.tensor(trials)
        handles = []
        try:
            for hooked in self._writers:
                edit = self._compiled(hooked, strengths, directions)
                if edit.input_scale is not None:
                    handles.append(hooked.module.register_forward_pre_hook(_scaling(edit.input_scale, rows)))
                handles.append(hooked.module.register_forward_hook(_editing(edit, rows, self._bias(hooked))))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _bias(self, hooked: _HookedWriter) -> Tensor | None:
        """Return a bias that is added to what the hooked module returns, [d]."""
        name = hooked.writer.bias if hooked.writer.bias_outside else None
        return read_parameter(self._loaded.model, name) if name else None

    def _compiled(self, hooked: _HookedWriter, strengths: Tensor, directions: Tensor) -> WriterEdit:
        writer, model = hooked.writer, self._loaded.model
        along = directions[:, writer.layer].to(hooked.device, torch.float64)  # [K, k, d]
        metric = None
        if writer.post_norms:
            pulled, metric = writer.pull_back(along.flatten(0, 1), partial(read_parameter, model))
            along = orthonormal_rows(pulled.view(len(along), -1, pulled.shape[-1]), metric)
        weight = None if self._mode == "none" else writer.matrix(read_parameter(model, writer.parameter))
        own = strengths[:, COMPONENTS.index(writer.component), writer.layer].to(hooked.device, torch.float64)
        own = own.repeat_interleave(writer.span, -1)
        return writer_edit(weight, along, own, self._mode, metric)


def _of_rows(table: Tensor, rows: Tensor | None, like: Tensor) -> Tensor:
    """Return each row's table, [n, ...], or the only one, [1, ...], in the precision of a forward."""
    table = table.to(like.device, torch.promote_types(like.dtype, torch.float32))
    return table if rows is None else table[rows.to(like.device)]


def _scaling(scale: Tensor, rows: Tensor | None) -> Any:
    def hook(_module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x = inputs[0]
        own = _of_rows(scale, rows, x)
        by_rows = x.reshape(len(own), -1, x.shape[-1]).to(own.dtype)
        return ((by_rows * own[:, None]).to(x.dtype).view_as(x), *inputs[1:])

    return hook


def _editing(edit: WriterEdit, rows: Tensor | None, bias: Tensor | None) -> Any:
    read, write, scale = edit.output_read, edit.output_write, edit.output_scale

    def edited(y: Tensor) -> Tensor:
        own_read, own_write = _of_rows(read, rows, y), _of_rows(write, rows, y)
        stream = y.reshape(len(own_read), -1, y.shape[-1]).to(own_read.dtype)
        stream = stream if bias is None else stream + bias.to(stream)
        changed = stream - (stream @ own_read.mT) @ own_write
        if scale is not None:
            changed = changed * _of_rows(scale, rows, y)[:, None]
        changed = changed if bias is None else changed - bias.to(changed)
        return changed.to(y.dtype).view_as(y)

    def hook(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        return (edited(output[0]), *output[1:]) if isinstance(output, tuple) else edited(output)

    return hook
