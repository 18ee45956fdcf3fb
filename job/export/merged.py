"""Writing the edited model, shard by shard, from the base model's files.

A shard is copied as it is and the edited tensors are written over their bytes in the copy: names,
order, dtypes and sizes stay those of the original, and only one tensor is in memory at a time.
In place of a copy of a quantised shard, its dequantised tensors are written (`job.model.safetensors_files`).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from job.architectures.spec import Architecture, Writer
from job.edits.compile import PreparedWriter, compile_edit
from job.errors import ExportMismatchError, ImpossibleJobError
from job.export.model_card import licence_files, model_card
from job.export.reproduction import Reproduction
from job.model.carried_files import carried_files
from job.model.quantization import plain_config
from job.model.safetensors_files import Checkpoint, Places, digest_of
from job.model.weight_files import INDEX, WEIGHTS
from job.numerics.ablation import RowNormalization, WriterEdit, edit_bias, edit_weight
from job.numerics.basis import Basis, DirectionPath
from job.records import EditParameters, Manifest, ManifestEntry
from job.storage.atomic import cannot_write, make_folder, sha256_file, sync_folder, write_atomically, write_record
from job.storage.exports import CARD, DONE, MANIFEST, REPRODUCE, SUMS
from job.system.failpoints import reached

CONFIG = "config.json"


@dataclass(frozen=True)
class Edit:
    """An edit that was chosen, as exports are given it.

    Attributes:
        parameters: Which directions of the basis are ablated, and how strongly.
        basis: The directions of all layers, or those that were learned for it.
        mode: Which norms of the weights it preserves.
    """

    parameters: EditParameters
    basis: Basis | DirectionPath
    mode: RowNormalization


def edited_tensors(
    checkpoint: Checkpoint, architecture: Architecture, edit: Edit
) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """Yield the name of every tensor in the files that the edit changes and a function that computes its new value."""
    for writer in architecture.writers:
        stored = StoredWriter(checkpoint, architecture, writer)
        compiled = stored.compile(edit)
        if not bool(compiled.write.any()):
            continue
        for name in writer.edited:
            for number, place in enumerate(checkpoint.places(architecture, name).names):
                yield place, partial(stored.edited, compiled, edit.mode, name, number)


@dataclass(frozen=True)
class StoredWriter:
    """A residual writer as the files hold it.

    Attributes:
        checkpoint: The files.
        architecture: The model's structure.
        writer: The writer.
    """

    checkpoint: Checkpoint
    architecture: Architecture
    writer: Writer

    def compile(self, edit: Edit, weight: Tensor | None = None) -> WriterEdit:
        """Compile an edit for the writer.

        Args:
            edit: The edit.
            weight: The weight, [d, i], if the edit's scales are wanted; `edit_weight` needs none.

        Raises:
            ImpossibleJobError: Its strengths are beyond what weights can hold.
        """
        candidates = self.writer.pull_back(edit.basis.candidates_of(self.writer.layer), self.read)
        compiled = compile_edit(
            PreparedWriter.of(self.writer, candidates, weight, edit.mode), edit.basis, edit.parameters
        )
        if not bool(compiled.finite):
            raise ImpossibleJobError(f"the edit of {self.writer.parameter} is too strong for 32-bit numbers")
        return compiled

    def read(self, name: str) -> Tensor:
        """Return a parameter that is one tensor in the files, by its name in the loaded model."""
        return self.checkpoint.tensor(self._places(name).names[0])

    def matrix(self, expert: int = 0) -> Tensor:
        """Return the weight, or that of an expert, with the axis of the stream first."""
        places = self._places(self.writer.parameter)
        if places.apart:
            part = self.checkpoint.tensor(places.names[expert])
            return self.writer.matrix(part.T if places.turned else part)
        if self.writer.kind == "experts":
            return self.writer.matrix(self.checkpoint.part(places.names[0], expert))
        return self.writer.matrix(self.checkpoint.tensor(places.names[0]))

    def edited(self, edit: WriterEdit, mode: RowNormalization, name: str, number: int) -> Tensor:
        """Return a tensor of the files as the edit leaves it, in the dtype that it is written in.

        Args:
            edit: The edit compiled for the writer.
            mode: Which norms of the weight it preserves.
            name: Name of the weight or bias in the loaded model.
            number: Which of its tensors.
        """
        places = self._places(name)
        place = places.names[number]
        shape, dtype = self.checkpoint.entry(place).shape, self.checkpoint.dtype(place)

        def edited(expert: int, read: Callable[[], Tensor]) -> Tensor:
            matrix = self.matrix(expert)
            if name != self.writer.parameter:
                return edit_bias(read(), matrix, edit, mode)
            return self.writer.unmatrix(edit_weight(matrix, edit, mode))

        if places.apart or self.writer.kind != "experts" or len(shape) == 1:  # experts may have one bias in common
            tensor = edited(number, partial(self.checkpoint.tensor, place))
            return (tensor.T if places.turned else tensor).to(dtype)
        # One expert at a time: all of them in float64 would take four times the memory of the tensor.
        result = torch.empty(shape, dtype=dtype)
        for expert, part in enumerate(result):
            part.copy_(edited(expert, partial(self.checkpoint.part, place, expert)))
        return result

    def _places(self, name: str) -> Places:
        return self.checkpoint.places(self.architecture, name)


def write_weights(
    source: Path,
    folder: Path,
    architecture: Architecture,
    edit: Edit,
    advance: Callable[[int], None],
    *,
    own_code: bool = False,
) -> None:
    """Write the edited model's weights and the files that go with them; safe to run again after a crash.

    Args:
        source: The base model's folder, which is only read.
        folder: The export's folder.
        architecture: The model's structure.
        edit: The edit.
        advance: Told of every shard written.
        own_code: The model's own modules are trusted, and go with it.

    Raises:
        ImpossibleJobError: The export would overwrite its source, or the source is damaged.
        MachineError: The folder cannot be written.
    """
    if folder.resolve() == source.resolve():
        raise ImpossibleJobError(f"{folder} holds the base model", remedy="export to another folder")
    checkpoint = Checkpoint(source)
    checkpoint.require_writers(architecture)
    edited = dict(edited_tensors(checkpoint, architecture, edit))
    try:
        make_folder(folder)
        (folder / DONE).unlink(missing_ok=True)
        for file in carried_files(source, code=own_code):
            write_atomically(folder / file.name, _companion(checkpoint, file))
        for file, entries in checkpoint.entries.items():
            partial = folder / f".{file.name}.partial"
            _begin_shard(checkpoint, file, partial)
            with partial.open("rb+") as stream:
                for name in entries.keys() & edited.keys():
                    stream.seek(entries[name].start)
                    stream.write(_bytes(edited[name]()))
                stream.flush()
                os.fsync(stream.fileno())
            reached("shard:written")
            partial.replace(folder / file.name)
            reached("shard:replaced")
            advance(1)
        sync_folder(folder)
    except OSError as error:
        raise cannot_write(folder, error) from error


def _companion(checkpoint: Checkpoint, file: Path) -> bytes:
    """Return what a file beside the weights says in an export: of dequantised ones that they are plain."""
    if checkpoint.quantisation is None or file.name not in (CONFIG, INDEX):
        return file.read_bytes()
    if file.name == CONFIG:
        return plain_config(file.read_text()).encode()
    index: dict[str, Any] = json.loads(file.read_text())
    shards = {name: shard.name for shard, entries in checkpoint.entries.items() for name in entries}
    total = sum(checkpoint.entry(name).size for name in shards)
    index["metadata"] = {"total_size": total}
    index["weight_map"] = dict(sorted(shards.items()))
    return (json.dumps(index, indent=2) + "\n").encode()


def _begin_shard(checkpoint: Checkpoint, file: Path, copy: Path) -> None:
    """Write a shard as it is before the edit: a copy, or tensor by tensor what its quantised ones stand for."""
    header = checkpoint.header(file)
    if header is None:
        shutil.copyfile(file, copy)
        reached("shard:begun")
        return
    with copy.open("wb") as stream:
        stream.write(header)
        for name in checkpoint.entries[file]:  # in the order of the file
            for block in _unedited(checkpoint, name):
                stream.write(block)
    reached("shard:begun")


def _unedited(checkpoint: Checkpoint, name: str) -> Iterator[bytes]:
    """Yield the bytes that the plain files have of a tensor that is not edited."""
    if checkpoint.is_dequantised(name):
        yield _bytes(checkpoint.tensor(name, checkpoint.dtype(name)))
    else:
        yield from checkpoint.stored_blocks(name)


def _bytes(tensor: Tensor) -> bytes:
    data: bytes = tensor.contiguous().view(torch.uint8).numpy().tobytes()
    return data


def verify_written(source: Path, folder: Path, architecture: Architecture, edit: Edit) -> None:
    """Read everything back: edited tensors must equal the numerics' result bit for bit, others the source.

    Raises:
        ExportMismatchError: A tensor does not.
    """
    checkpoint, written = Checkpoint(source), Checkpoint(folder)
    edited = dict(edited_tensors(checkpoint, architecture, edit))
    for file, entries in checkpoint.entries.items():
        copy = folder / file.name
        if written.entries.get(copy) != entries:
            raise ExportMismatchError(f"{copy} does not hold the tensors of {file.name}")
        for name, entry in entries.items():
            expected = hashlib.sha256()
            for block in [_bytes(edited[name]())] if name in edited else _unedited(checkpoint, name):
                expected.update(block)
            if digest_of(copy, entry) != expected.digest():
                raise ExportMismatchError(
                    f"tensor {name} in {copy} is not what it should be", remedy="check the disk and run again"
                )


def copy_licences(source: Path, folder: Path) -> None:
    """Copy the files that state a model's terms, for exports that hold nothing else of it."""
    for name in licence_files(source):
        write_atomically(folder / name, (source / name).read_bytes())


def seal_made(folder: Path, made: Reproduction, source: Path) -> None:
    """Complete an export with its reproduce.json and its card.

    Args:
        folder: The export.
        made: How it was made; the hashes of its weights are put in here.
        source: Folder of the base model.
    """

    def describe(weights: Mapping[str, str]) -> dict[str, str]:
        whole = made.model_copy(update={"weights": dict(weights)}).cleaned()
        return {REPRODUCE: whole.model_dump_json(indent=2) + "\n", CARD: model_card(whole, source)}

    seal(folder, describe)


def seal(folder: Path, describe: Callable[[Mapping[str, str]], Mapping[str, str]]) -> None:
    """Complete an export: what describes it, the hashes of all files, and last the mark that it is done.

    Args:
        folder: The export.
        describe: Given the sha256 of every file of weights, returns the names and texts of what describes them.
    """
    for name in (REPRODUCE, CARD, SUMS, MANIFEST):
        (folder / name).unlink(missing_ok=True)
    entries = dict(build_manifest(folder).files)
    weights = {name: entry.sha256 for name, entry in entries.items() if name.endswith(WEIGHTS)}
    for name, text in describe(weights).items():
        write_atomically(folder / name, text.encode())
        entries[name] = _file_entry(folder / name)
    sums = "".join(f"{entries[name].sha256}  {name}\n" for name in sorted(entries))
    write_atomically(folder / SUMS, sums.encode())
    entries[SUMS] = _file_entry(folder / SUMS)
    write_record(folder / MANIFEST, Manifest(files=dict(sorted(entries.items()))))
    write_atomically(folder / DONE, (sha256_file(folder / MANIFEST) + "\n").encode())


def build_manifest(folder: Path) -> Manifest:
    """Return the manifest of a folder as it stands."""
    names: Sequence[str] = sorted(
        path.name
        for path in folder.iterdir()
        if path.is_file() and not path.name.startswith(".") and path.name != MANIFEST
    )
    return Manifest(files={name: _file_entry(folder / name) for name in names})


def _file_entry(path: Path) -> ManifestEntry:
    return ManifestEntry(sha256=sha256_file(path), size=path.stat().st_size)
