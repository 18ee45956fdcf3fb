"""Weights that are NaN or infinite: found before anything is computed with them, and named with their file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from job.errors import ImpossibleJobError
from job.model.weight_files import checkpoint_files

# What attention masks are called, which older models keep among their weights: infinite ones are no damage.
_MASK = "mask"


def is_finite(tensor: Tensor) -> bool:
    """Return whether no entry is NaN or infinite: its least and greatest are NaN if any is; one pass, no copy."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    if tensor.element_size() == 1:
        tensor = tensor.float()  # 8-bit floats have no order
    return bool(torch.stack(tensor.detach().aminmax()).isfinite().all())


def infinite_parameter(model: nn.Module) -> str | None:
    """Return the name of a loaded parameter with NaN or infinite entries, or None.

    One pass, about as long as a forward of one token. Skips weights on disk, and packed 4-bit ones, which are no
    floats.
    """
    parameters = (one for one in model.named_parameters() if not one[1].is_meta)
    return next((name for name, parameter in parameters if not is_finite(parameter)), None)


def require_finite(folder: Path) -> None:
    """Raise ImpossibleJobError naming a weight with NaN or infinite values; reads all files, on the CPU."""
    for file, name in _infinite_tensors(folder):
        raise ImpossibleJobError(
            f"weight {name} in {file} has values that are not finite", remedy="obtain an undamaged copy of the model"
        )


def _infinite_tensors(folder: Path) -> Iterator[tuple[Path, str]]:
    for file in checkpoint_files(folder):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - it is no dictionary
                if _MASK not in name and not is_finite(tensors.get_tensor(name)):
                    yield file, name
