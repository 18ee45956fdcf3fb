"""Edits by their definition, as a reference for compiled ones."""

from __future__ import annotations

import torch
from torch import Tensor

from job.numerics.ablation import WriterEdit


def plain_edit(directions: Tensor, strengths: Tensor) -> WriterEdit:
    """Return the edit that removes directions [k, d] with strengths [k], independent of a weight."""
    return WriterEdit(
        read=directions,
        write=strengths[:, None] * directions,
        row_norms=None,
        row_inverses=None,
        output_scale=None,
        input_scale=None,
        least_share=torch.ones(()),
        finite=torch.ones((), dtype=torch.bool),
    )
