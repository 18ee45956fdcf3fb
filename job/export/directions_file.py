"""The edit file: directions and parameters alone, and their application to the base model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from job.architectures.spec import Architecture
from job.config.load import default_values
from job.config.schema import AblationSettings
from job.directions.learned import checked_path, require_fit
from job.errors import ExportMismatchError, UsageError
from job.export.merged import Edit, seal_made, verify_written, write_weights
from job.export.reproduction import Reproduction, check_reproduction
from job.model.device_faults import clear_faults
from job.model.safetensors_files import Checkpoint
from job.numerics.basis import Basis, DirectionPath
from job.proof.truth_test import inspect_model
from job.records import Record
from job.storage.atomic import cannot_write, ensure_folder, sync_folder, write_atomically
from job.system.failpoints import reached

EDIT_FILE = "edit.safetensors"
_ENTRY = "abliterate"
# Tensor name of learned directions.
_PATH = "path"


class _Header(Record):
    """Metadata of an edit file; `base_sha256` hashes the base model's tensors that the edit changes."""

    version: Literal[1] = 1
    model_type: str
    base_sha256: str
    made: Reproduction


def write_edit_file(folder: Path, source: Path, architecture: Architecture, edit: Edit, made: Reproduction) -> None:
    """Write an edit file, read it back and compare. Raises ExportMismatchError or MachineError."""
    digest = Checkpoint(source).digest(architecture)
    header = _Header(model_type=architecture.model_type, base_sha256=digest, made=made)
    tensors = _tensors(edit.basis)
    ensure_folder(folder)
    # A single entry, since safetensors orders several arbitrarily and equal edits must give equal bytes.
    write_atomically(folder / EDIT_FILE, save(tensors, metadata={_ENTRY: header.model_dump_json()}))
    read, found = _read(folder / EDIT_FILE)
    same = all(torch.equal(tensor, _tensors(found)[name]) for name, tensor in tensors.items())
    if not same or read != header:
        raise ExportMismatchError(f"{folder / EDIT_FILE} does not hold what was written", remedy="check the disk")


def _tensors(basis: Basis | DirectionPath) -> dict[str, Tensor]:
    if isinstance(basis, DirectionPath):
        return {_PATH: basis.directions.contiguous().cpu()}
    return {"directions": basis.directions.contiguous().cpu(), "weights": basis.weights.contiguous().cpu()}


def _read(file: Path) -> tuple[_Header, Basis | DirectionPath]:
    try:
        with safe_open(file, framework="pt") as stored:
            header = _Header.model_validate_json((stored.metadata() or {}).get(_ENTRY, ""))
            check_reproduction(header.made)
            AblationSettings.model_validate({**default_values()["ablation"], **header.made.settings["ablation"]})
            if header.made.edit.directions is not None:
                path = checked_path(stored.get_tensor(_PATH))
                require_fit(header.made.edit, path)
                return header, path
            return header, Basis(stored.get_tensor("directions"), stored.get_tensor("weights"))
    except FileNotFoundError:
        raise UsageError(f"there is no file {file}", remedy=f"give the {EDIT_FILE} of an export") from None
    except (OSError, KeyError, SafetensorError, ValueError) as error:
        raise UsageError(
            f"{file} is not an edit of this version", remedy=f"give the {EDIT_FILE} of an export"
        ) from error


def apply_edit(source: Path, file: Path, out: Path, advance: Callable[[int], None]) -> None:
    """Write the edited model that an edit file, or its folder, describes, into a new or empty folder.

    Raises UsageError if file, model and folder do not fit, ExportMismatchError if the result differs, or MachineError.
    """
    header, basis = _read(file / EDIT_FILE if file.is_dir() else file)
    architecture = inspect_model(source)
    if not header.made.settings["ablation"].get("through_norms", True):
        architecture = architecture.without_norms()
    architecture = architecture.pulled_back(header.made.resolution.pull_back or "gain")
    if Checkpoint(source).digest(architecture) != header.base_sha256:
        name = header.made.base_model or f"another of type {header.model_type}"
        raise UsageError(f"{source} is not the model that the edit was made for", remedy=f"that was {name}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out} is not empty", remedy="name a new or empty folder")
    edit = Edit(header.made.edit, basis, header.made.settings["ablation"]["row_normalization"])
    # Written beside it until complete, so that the folder never holds a partial model.
    partial = out.absolute().with_name(f".{out.name}.partial")
    try:
        with clear_faults():
            write_weights(source, partial, architecture, edit, advance, own_code=True)
            verify_written(source, partial, architecture, edit)
        seal_made(partial, header.made.model_copy(update={"format": "merged"}), source)
        reached("applied:written")
        partial.replace(out)
        reached("applied:replaced")
        sync_folder(out.absolute().parent)
    except OSError as error:
        raise cannot_write(out, error) from error
