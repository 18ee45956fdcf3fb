"""config.json and generation_config.json, validated before transformers reads them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from job.errors import ImpossibleJobError
from job.model.user_files import object_of

CONFIG, GENERATION = "config.json", "generation_config.json"
# No real model has more layers; building a larger one takes hours, even without weights.
_MOST_LAYERS = 10_000
_MOST = 10**9
# transformers makes a name for every label: a larger number takes the memory of the machine.
_LABELS, _MOST_LABELS = "num_labels", 10**6
_DTYPE_KEYS, _DTYPES = ("dtype", "torch_dtype"), ("float32", "bfloat16", "float16", "float64")
_OF_QUANTISATION = ("quantization_config", "compression_config")
_COUNTS = ("num_", "n_", "_size", "_dim", "max_position")


def model_config(folder: Path) -> dict[str, Any]:
    """Return a model folder's config.json. Raises ImpossibleJobError if missing, damaged or absurd."""
    if not (folder / CONFIG).is_file():
        what = "is not a model folder: it has no config.json" if folder.is_dir() else "does not exist"
        raise ImpossibleJobError(f"{folder} {what}", remedy="give the folder of a model in Hugging Face format")
    found = object_of(folder / CONFIG)
    _refuse_large(found, folder / CONFIG)
    _refuse_dtype(found, folder / CONFIG)
    if (folder / GENERATION).is_file():
        object_of(folder / GENERATION)
    return found


def _refuse_dtype(values: Mapping[str, Any], file: Path) -> None:
    """Refuse a dtype that no model is built in; that of a quantisation has its own values."""
    for name, value in values.items():
        if isinstance(value, Mapping) and name.endswith("_config") and name not in _OF_QUANTISATION:
            _refuse_dtype(value, file)
        elif name in _DTYPE_KEYS and value is not None and value not in _DTYPES:
            raise ImpossibleJobError(
                f"{file}: {name} is {value!r}, which is no dtype of a model", remedy=f"write {', '.join(_DTYPES)}"
            )


def _refuse_large(values: Mapping[str, Any], file: Path) -> None:
    for name, value in values.items():
        if isinstance(value, Mapping):
            _refuse_large(value, file)
        elif isinstance(value, int | float):
            layers = "layer" in name and name.startswith(("num_", "n_"))
            most = _MOST_LAYERS if layers else _MOST if any(part in name for part in _COUNTS) else None
            most = _MOST_LABELS if name == _LABELS else most
            if most is not None and value > most:
                raise ImpossibleJobError(
                    f"{file} is damaged: {name} is {value}, but no model has more than {most}",
                    remedy="obtain an undamaged copy",
                )
