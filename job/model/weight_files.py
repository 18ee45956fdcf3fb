"""The safetensors files that transformers loads, ignoring others beside them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from job.errors import ImpossibleJobError, in_one_line
from job.model.safetensors_header import read_header
from job.text.decoding import LFS_POINTER, decoded

WEIGHTS = ".safetensors"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER = "adapter_config.json"
_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
_COPY = "obtain an undamaged copy of the model"
# By name the type, as safetensors calls it, and the shape of every tensor in a model's files.
Headers = Mapping[str, tuple[str, tuple[int, ...]]]


def loaded_weights(names: Collection[str], read_index: Callable[[], bytes]) -> frozenset[str]:
    """Return the safetensors files that transformers loads. Raises ImpossibleJobError for a damaged index.

    A single file precedes the index, and the index precedes others such as Mistral's consolidated copy.
    """
    if SINGLE in names:
        return frozenset({SINGLE})
    weights = frozenset(name for name in names if name.endswith(WEIGHTS))
    if INDEX not in names or all(_SHARD.fullmatch(name) for name in weights):
        return weights
    return frozenset(indexed_tensors(read_index()).values()) & weights


def indexed_tensors(data: bytes) -> dict[str, str]:
    """Return the file of every tensor in an index. Raises ImpossibleJobError if it is damaged or leads outside."""
    if data.startswith(LFS_POINTER):
        raise ImpossibleJobError(
            f"{INDEX} is a Git LFS pointer, not the file itself", remedy="run `git lfs pull` there"
        )
    try:
        index = json.loads(data.decode("utf-8"))
        if not isinstance(index, dict) or not isinstance(index.get("weight_map"), dict) or "metadata" not in index:
            raise ValueError("it needs the objects weight_map and metadata")
        places, _ = index["weight_map"], dict(index["metadata"])  # transformers requires both
        names = set(places.values())
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise ImpossibleJobError(f"{INDEX} is damaged: {in_one_line(error)}", remedy=_COPY) from error
    if odd := [name for name in names if not isinstance(name, str) or Path(name).name != name]:
        raise ImpossibleJobError(f"{INDEX} names {odd[0]!r}, which is not a file in the folder", remedy=_COPY)
    return dict(places)


def refuse_adapter(where: str, names: Collection[str], adapter: Mapping[str, Any] | None) -> None:
    """Raise ImpossibleJobError for a LoRA adapter (its config), which transformers would attach to a model."""
    if adapter is None:
        return
    if SINGLE not in names and INDEX not in names:
        base = adapter.get("base_model_name_or_path")
        raise ImpossibleJobError(
            f"{where} holds a LoRA adapter but no model" + (f": its base model is {base}" if base else ""),
            remedy="merge it into its base model (merge_and_unload of PEFT) and give the result",
        )
    raise ImpossibleJobError(
        f"{where} holds a LoRA adapter beside the model, which would be loaded with it",
        remedy=f"merge it into the model, or move {ADAPTER} away",
    )


def require_loadable(where: str, names: Collection[str]) -> None:
    """Raise ImpossibleJobError if transformers would not load the weights: none, or shards without index."""
    weights = sorted(name for name in names if name.endswith(WEIGHTS))
    if not weights:
        raise ImpossibleJobError(
            f"{where} has no safetensors weights",
            remedy="convert the model with save_pretrained, which writes safetensors",
        )
    if SINGLE not in names and INDEX not in names:
        raise ImpossibleJobError(
            f"{where} has weights ({weights[0]}) but neither {SINGLE} nor {INDEX}, so they would not be loaded",
            remedy=f"obtain a complete copy, or name the file {SINGLE} if it is the only one",
        )


def read_adapter(folder: Path) -> dict[str, Any] | None:
    """Return the readable content of a folder's adapter_config.json, None without one."""
    file = folder / ADAPTER
    if not file.is_file():
        return None
    try:
        found = json.loads(decoded(file.read_bytes()))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def checkpoint_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a folder that transformers loads. Raises ImpossibleJobError."""
    names = {path.name for path in folder.iterdir() if path.is_file()} if folder.is_dir() else set()
    refuse_adapter(str(folder), names, read_adapter(folder))
    require_loadable(str(folder), names)
    if SINGLE in names:
        return [folder / SINGLE]
    wanted = sorted(set(indexed_tensors((folder / INDEX).read_bytes()).values()))
    missing = [name for name in wanted if name not in names]
    if missing:
        raise ImpossibleJobError(f"{folder} lacks {missing[0]}, which {INDEX} names", remedy="obtain a complete copy")
    return [folder / name for name in wanted]


def stored_tensors(folder: Path) -> Headers:
    """Return the tensors in a folder's files; none if any file is missing. Raises ImpossibleJobError if damaged."""
    try:
        files = checkpoint_files(folder)
    except ImpossibleJobError:
        return {}
    return {name: (entry.dtype, entry.shape) for file in files for name, entry in read_header(file).items()}


def require_complete(folder: Path, names: Collection[str], tensors: Collection[str]) -> None:
    """Raise ImpossibleJobError if an index is damaged, or names missing files or tensors."""
    index = folder / INDEX
    if SINGLE in names or not index.is_file():
        return
    places = indexed_tensors(index.read_bytes())
    lacking = sorted({*places.values()} - set(names))
    lacking += [f"{name} of {places[name]}" for name in sorted(places.keys() - set(tensors))]
    if lacking:
        raise ImpossibleJobError(f"the model lacks {lacking[0]}, which {INDEX} names", remedy="obtain a complete copy")


def left_aside(names: Collection[str], listed: Collection[str]) -> list[str]:
    """Return the names of unused weights and index."""
    stale = [INDEX] if SINGLE in names and INDEX in names else []
    return sorted(name for name in names if name.endswith(WEIGHTS) and name not in listed) + stale
