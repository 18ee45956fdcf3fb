"""KL divergence and log-odds."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Rows converted to float64 at a time: hundreds of rows of a large vocabulary would take gigabytes.
_ROWS = 32


def kl_divergence(base_log_probs: Tensor, logits: Tensor) -> Tensor:
    """Return KL(base ‖ edited) [rows], nats, float64; base log-probabilities and edited logits [rows, vocabulary]."""
    blocks = zip(torch.split(base_log_probs, _ROWS), torch.split(logits, _ROWS), strict=True)
    return torch.cat([_kl_divergence(base.double(), edited.double()) for base, edited in blocks])


def _kl_divergence(base: Tensor, logits: Tensor) -> Tensor:
    edited = torch.log_softmax(logits, dim=-1)
    # A token with base probability 0 contributes 0, whatever the edited model predicts.
    return torch.where(base == -math.inf, 0.0, base.exp() * (base - edited)).sum(-1)


def log_odds(logits: Tensor, tokens: Tensor) -> Tensor:
    """Return the log-odds of one token [rows] per row of logits [rows, vocabulary], [rows]."""
    chosen = logits.gather(-1, tokens[:, None])
    others = logits.scatter(-1, tokens[:, None], -math.inf)
    return chosen[:, 0] - others.logsumexp(-1)
