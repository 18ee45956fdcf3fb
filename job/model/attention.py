"""Attention kernels: those that this project must not use."""

from __future__ import annotations

import torch


def disable_cudnn_attention() -> None:
    """Keep cuDNN's attention off in this process: it builds a plan for every shape.

    Public reports say 23 to 440 ms a plan, and a decoding step has a new shape each time (docs/decisions/0023).
    """
    torch.backends.cuda.enable_cudnn_sdp(False)
