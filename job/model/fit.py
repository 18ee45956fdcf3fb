"""Whether a model's weights fit its configuration, told by transformers itself: before and after they are loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from job.architectures.tiny_model import empty_model
from job.errors import ImpossibleJobError, in_one_line

_PROBLEMS = ("missing_keys", "mismatched_keys", "error_msgs")
# What transformers says where it cannot put experts together.
_CONVERSION = "conversion of the weights"
# Files that a message names, of many shards.
_NAMED = 3


def require_fit(folder: Path, files: Sequence[str], loading: Mapping[str, Any]) -> None:
    """Raise ImpossibleJobError if transformers' report on `loading` has weights missing or of another size."""
    named = ", ".join(files[:_NAMED]) + ", …" * (len(files) > _NAMED)
    for problem in _PROBLEMS:
        if loading.get(problem):
            raise ImpossibleJobError(
                f"the weights of {folder} ({named}) do not fit its config.json "
                f"({problem.replace('_', ' ')}: {sorted(map(str, loading[problem]))[0]})",
                remedy="obtain an undamaged copy of the model",
            )


def untied(model: PreTrainedModel) -> list[str]:
    """Return the weights that the configuration ties to others, and for which the files hold different values.

    transformers loads such weights as they are, with a warning of its own.
    """
    by_config = model.get_expanded_tied_weights_keys(all_submodels=True)
    return sorted(by_config.keys() - model.all_tied_weights_keys.keys())


def unloadable(folder: Path, error: Exception) -> ImpossibleJobError:
    """Return the error for weights over which a library raises one."""
    return ImpossibleJobError(
        f"the weights of {folder} cannot be loaded: {in_one_line(error)}",
        remedy="obtain an undamaged copy of the model",
    )


def require_fitting_headers(
    folder: Path, files: Sequence[str], config: PretrainedConfig, shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Raise ImpossibleJobError if plain weights, by the tensors' shapes alone, are missing or of another size."""
    weights = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    try:
        _, loading = type(empty_model(config)).from_pretrained(
            None,
            config=config,
            state_dict=weights,
            dtype="float32",
            device_map={"": "meta"},
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    except Exception as error:
        if _CONVERSION in str(error):
            raise unloadable(folder, error) from error
        return  # a family that needs the values while they are loaded: loading them tells
    require_fit(folder, files, loading)
