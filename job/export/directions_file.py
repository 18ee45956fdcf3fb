"""The edit file: directions and parameters alone, and their application to the base model."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from transformers import PreTrainedModel

from job.architectures.spec import Architecture
from job.architectures.structure import discover
from job.config.load import default_values
from job.config.sections import AblationSettings
from job.directions.learned import checked_path, require_fit
from job.edits.compile import no_directions
from job.edits.hooks import Intervention
from job.errors import ExportMismatchError, UsageError, refusing
from job.export.merged import Edit as MergedEdit
from job.export.merged import seal_made, write_weights
from job.export.reproduction import Reproduction, check_reproduction
from job.model.device_faults import clear_faults
from job.model.safetensors_files import Checkpoint
from job.numerics.basis import Basis, DirectionPath
from job.proof.truth_test import inspect_model, supported
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


def write_edit_file(
    folder: Path, source: Path, architecture: Architecture, edit: MergedEdit, made: Reproduction
) -> None:
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


def _given(path: DirectionPath, _name: str) -> DirectionPath:
    return path


@dataclass(frozen=True)
class SavedEdit:
    """An edit as read from its file: parameters and directions, for one base model."""

    _header: _Header
    _directions: Basis | DirectionPath

    @classmethod
    def load(cls, file: Path | str) -> SavedEdit:
        """Read an edit file, or that of an export's folder. Raises UsageError."""
        file = Path(file)
        return cls(*_read(file / EDIT_FILE if file.is_dir() else file))

    @property
    def made(self) -> Reproduction:
        """Where the edit comes from: job, trial, settings, prompts, figures."""
        return self._header.made

    @property
    def model_type(self) -> str:
        """Model type of the base model."""
        return self._header.model_type

    @property
    def base_model(self) -> str:
        """The base model in words."""
        return self.made.base_model or f"another of type {self.model_type}"

    @property
    def strengths(self) -> MergedEdit:
        """The edit, for files of weights."""
        return MergedEdit(self.made.edit, self._directions, self.made.settings["ablation"]["row_normalization"])

    def architecture_in(self, source: Path) -> Architecture:
        """Return the structure of its base model's files. Raises UsageError for another model's."""
        architecture = self._with_norms(inspect_model(source))
        if Checkpoint(source).digest(architecture) != self._header.base_sha256:
            raise UsageError(
                f"{source} is not the model that the edit was made for", remedy=f"that was {self.base_model}"
            )
        return architecture

    def _with_norms(self, architecture: Architecture) -> Architecture:
        if not self.made.settings["ablation"].get("through_norms", True):
            return architecture.without_norms()
        return architecture.pulled_back(self.made.resolution.pull_back or "gain")

    @contextmanager
    def apply(self, model: PreTrainedModel) -> Iterator[PreTrainedModel]:
        """Apply the edit to every forward pass of a loaded model within the block; its weights stay as they are.

        The base model's files are compared with those of the edit if the model was loaded from a folder; else only its
        type and sizes. Raises UsageError for another model, or UnsupportedArchitectureError.
        """
        architecture = self._structure_of(model)
        found = self._directions
        learned: Callable[[str], DirectionPath] = no_directions
        if isinstance(found, DirectionPath):  # a basis of its form: the edit refers to the path alone
            learned = partial(_given, found)
            found = Basis(found.directions[0], found.directions.new_ones(found.directions.shape[1:3]))
        mode = self.made.settings["ablation"]["row_normalization"]
        with Intervention(model, architecture, found, mode, learned) as hooks:
            active = hooks.activate([self.made.edit])
            if active.reasons[0] is not None:
                raise UsageError(active.reasons[0], remedy="choose another trial's edit")
            with active.on_every_row(model):
                yield model

    def _structure_of(self, model: PreTrainedModel) -> Architecture:
        source, config = Path(model.name_or_path), model.config
        if str(config.model_type) != self.model_type:
            raise UsageError(f"the edit is for models of type {self.model_type}, not {config.model_type}")
        if model.name_or_path and source.is_dir():
            self.architecture_in(source)
        else:
            with refusing(self.model_type, "a small test copy built from its configuration fails"):
                supported(config)
        architecture, width = self._with_norms(discover(model)), int(config.get_text_config().hidden_size)
        wanted = self._directions.layers, self._directions.directions.shape[-1]
        if (architecture.layer_count, width) != wanted:
            raise UsageError(
                f"the edit is for {wanted[0]} layers of width {wanted[1]}, the model has {architecture.layer_count} of "
                f"width {width}",
                remedy=f"load {self.base_model}",
            )
        return architecture


def apply_edit(source: Path, file: Path, out: Path, advance: Callable[[int], None]) -> None:
    """Write the edited model that an edit file, or its folder, describes, into a new or empty folder.

    Raises UsageError if file, model and folder do not fit, ExportMismatchError if the result differs, or MachineError.
    """
    saved, out = SavedEdit.load(file), Path(os.path.realpath(out))
    architecture, edit = saved.architecture_in(source), saved.strengths
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out} is not empty", remedy="name a new or empty folder")
    # Written beside it until complete, so that the folder never holds a partial model.
    partial = out.absolute().with_name(f".{out.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)  # of an interrupted start, perhaps for another model
        with clear_faults():
            written = write_weights(source, partial, architecture, edit, advance, own_code=True)
            written.verify()
        seal_made(partial, saved.made.model_copy(update={"format": "merged"}), source, known=written.hashes)
        reached("applied:written")
        partial.replace(out)
        reached("applied:replaced")
        sync_folder(out.absolute().parent)
    except OSError as error:
        raise cannot_write(out, error) from error
