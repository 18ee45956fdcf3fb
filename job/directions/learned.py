"""Files of learned directions, named by their hash, in run folders and exports."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from job.errors import DamagedError, UsageError
from job.numerics.basis import DirectionPath
from job.records import EditParameters
from job.storage.atomic import ensure_folder, write_atomically
from job.storage.run_folder import RunFolder

# Name in an export. Not .safetensors: loaders take every file with that suffix for weights.
EXPORTED = "learned.directions"
_TENSOR = "path"


def learned_file(folder: RunFolder, sha256: str) -> Path:
    """Return the path of learned directions in a run folder."""
    return folder.path / "directions" / f"learned-{sha256}.safetensors"


def keep_learned(folder: RunFolder, path: DirectionPath) -> str:
    """Write learned directions into a run folder; return the file's SHA-256. Raises MachineError."""
    contents = save({_TENSOR: path.directions.to("cpu", torch.float32).contiguous()})
    name = hashlib.sha256(contents).hexdigest()
    file = learned_file(folder, name)
    ensure_folder(file.parent)
    write_atomically(file, contents)
    return name


def read_learned(folder: RunFolder, sha256: str) -> DirectionPath:
    """Read learned directions from a run folder. Raises DamagedError if the file is missing or damaged."""
    file = learned_file(folder, sha256)
    try:
        return parse_learned(file.read_bytes(), sha256)
    except (OSError, ValueError) as error:
        raise DamagedError(
            f"the learned directions {file} are missing or damaged",
            remedy="restore the file from a copy or a checkpoint, or move the run folder away to start again",
        ) from error


def export_learned(folder: RunFolder, edit: EditParameters, export: Path) -> None:
    """Copy an edit's learned directions into its export, or remove a stale copy. Raises DamagedError."""
    if edit.directions is None:
        (export / EXPORTED).unlink(missing_ok=True)
        return
    read_learned(folder, edit.directions.sha256)
    write_atomically(export / EXPORTED, learned_file(folder, edit.directions.sha256).read_bytes())


def import_learned(folder: RunFolder, edit: EditParameters, source: Path) -> None:
    """Copy learned directions from an export into a run folder. Raises UsageError or MachineError."""
    if edit.directions is None or learned_file(folder, edit.directions.sha256).exists():
        return
    try:
        path = parse_learned((source / EXPORTED).read_bytes(), edit.directions.sha256)
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{source / EXPORTED} does not hold the directions that reproduce.json names",
            remedy="keep the export's files together",
        ) from error
    keep_learned(folder, path)


def parse_learned(contents: bytes, sha256: str) -> DirectionPath:
    """Parse the contents of a directions file; ValueError if hash or format are wrong."""
    if hashlib.sha256(contents).hexdigest() != sha256:
        raise ValueError("the file has another hash")
    try:
        directions = load(contents)[_TENSOR]
    except (KeyError, SafetensorError) as error:
        raise ValueError("the file holds no learned directions") from error
    return checked_path(directions)


def checked_path(directions: torch.Tensor) -> DirectionPath:
    """Return directions as a path; ValueError unless they are finite floats with four axes."""
    if directions.dim() != 4 or not directions.is_floating_point() or not bool(directions.isfinite().all()):
        raise ValueError("the tensor does not have the shape of directions")
    return DirectionPath(directions)


def require_fit(edit: EditParameters, path: DirectionPath) -> None:
    """Raise ValueError if an edit's strengths or position do not fit its directions."""
    if edit.layer_strengths is None or edit.directions is None:
        raise ValueError("the edit names no learned directions")
    shape = (len(edit.layer_strengths["mlp"]), len(edit.layer_strengths["mlp"][0]))
    if shape != (path.layers, path.size):
        raise ValueError(f"strengths for {shape[1]} directions in {shape[0]} layers do not fit the directions")
    path.combine(edit.directions.position)
