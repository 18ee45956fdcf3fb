"""Weights that bitsandbytes quantises while they are loaded."""

from __future__ import annotations

from typing import Literal

import torch
from transformers import BitsAndBytesConfig

from job.system.extras import require_quantization

LoadIn = Literal["bnb-4bit", "bnb-8bit"]
LOAD_IN: tuple[LoadIn, ...] = ("bnb-4bit", "bnb-8bit")


def bitsandbytes_config(name: LoadIn | Literal["none"]) -> BitsAndBytesConfig | None:
    """Return how weights are quantised, None for "none". Raises MissingPackageError."""
    if name == "none":
        return None
    require_quantization(name)
    if name == "bnb-8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
