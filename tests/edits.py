"""Edits by their definition, as a reference for compiled ones."""

from __future__ import annotations

import torch
from torch import Tensor

from job.numerics.ablation import WriterEdit


def plain_edit(directions: Tensor, strengths: Tensor, metric: Tensor | None = None) -> WriterEdit:
    """Return the edit that removes directions [k, d] with strengths [k], independent of a weight.

    `metric` [d] is the factor from what is read to what is written.
    """
    written = directions if metric is None else directions * metric
    return WriterEdit(
        read=directions,
        write=strengths[:, None] * written,
        row_norms=None,
        row_inverses=None,
        output_scale=None,
        input_scale=None,
        least_share=torch.ones(()),
        finite=torch.ones((), dtype=torch.bool),
    )
