"""Measures of change."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def kl_divergence(base_log_probs: Tensor, logits: Tensor) -> Tensor:
    """Return KL(base ‖ edited) per row over the full vocabulary, in nats, float64.

    Args:
        base_log_probs: Log-probabilities of the base model, [rows, vocabulary].
        logits: Raw logits of the edited model, [rows, vocabulary].
    """
    base = base_log_probs.to(torch.float64)
    edited = torch.log_softmax(logits.to(torch.float64), dim=-1)
    # A token that the base gives probability 0 contributes 0, whatever the edited model gives it.
    terms = torch.where(base == -math.inf, 0.0, base.exp() * (base - edited))
    return terms.sum(-1)
