"""Write the edited model, shard by shard, from the base model's files.

Edited tensors take the place of the original ones: names, order, dtypes and sizes stay the original's. Quantised shards
are dequantised (`job.model.safetensors_files`). `job.export.shards` writes the files and proves them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from job.architectures.spec import Architecture, Writer
from job.edits.compile import PreparedWriter, compile_edit
from job.errors import ImpossibleJobError
from job.export.model_card import model_card, title
from job.export.picture import card_picture
from job.export.reproduction import Reproduction
from job.export.shards import WrittenShards
from job.model.carried_files import carried_files, licence_files
from job.model.quantization import plain_config
from job.model.safetensors_files import Checkpoint, Places
from job.model.weight_files import INDEX, WEIGHTS
from job.numerics.ablation import RowNormalization, WriterEdit, edit_bias, edit_weight
from job.numerics.basis import Basis, DirectionPath
from job.numerics.rounding import rounded_along
from job.records import DetectorReport, EditParameters, Manifest, ManifestEntry
from job.records.evaluation import Benchmarks
from job.storage.atomic import cannot_write, make_folder, sha256_file, sync_folder, write_atomically, write_record
from job.storage.exports import CARD, DONE, MANIFEST, PICTURE, REPRODUCE, SUMS

CONFIG = "config.json"


@dataclass(frozen=True)
class Edit:
    """The edit to export: parameters, their directions, and the norm-preserving mode."""

    parameters: EditParameters
    basis: Basis | DirectionPath
    mode: RowNormalization


def edited_tensors(
    checkpoint: Checkpoint, architecture: Architecture, edit: Edit
) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """Yield the name of every stored tensor that the edit changes, and a function that computes its new value."""
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
    """A residual writer as stored in the files."""

    checkpoint: Checkpoint
    architecture: Architecture
    writer: Writer

    def compile(self, edit: Edit, weight: Tensor | None = None) -> WriterEdit:
        """Compile an edit; only scales need the weight [d, i]. Raises ImpossibleJobError if strengths overflow."""
        candidates, metric = self.writer.pull_back(edit.basis.candidates_of(self.writer.layer), self.read)
        prepared = PreparedWriter.of(self.writer, candidates, weight, edit.mode, metric)
        compiled = compile_edit(prepared, edit.basis, edit.parameters)
        if not bool(compiled.finite):
            raise ImpossibleJobError(f"the edit of {self.writer.parameter} is too strong for 32-bit numbers")
        return compiled

    def read(self, name: str) -> Tensor:
        """Return a parameter stored as one tensor, by its name in the loaded model."""
        return self.checkpoint.tensor(self._places(name).names[0])

    def matrix(self, expert: int = 0) -> Tensor:
        """Return the weight, or an expert's, with the stream axis first."""
        places = self._places(self.writer.parameter)
        if places.apart:
            part = self.checkpoint.tensor(places.names[expert])
            return self.writer.matrix(part.T if places.turned else part)
        if self.writer.kind == "experts":
            return self.writer.matrix(self.checkpoint.part(places.names[0], expert))
        return self.writer.matrix(self.checkpoint.tensor(places.names[0]))

    def edited(self, edit: WriterEdit, mode: RowNormalization, name: str, number: int) -> Tensor:
        """Return an edited tensor in its stored dtype; `number` selects one of a parameter's tensors."""
        places = self._places(name)
        place = places.names[number]
        shape, dtype = self.checkpoint.entry(place).shape, self.checkpoint.dtype(place)

        def edited(expert: int, read: Callable[[], Tensor]) -> Tensor:
            matrix = self.matrix(expert)
            if name != self.writer.parameter:
                return edit_bias(read(), matrix, edit, mode)
            weight = edit_weight(matrix, edit, mode)
            return self.writer.unmatrix(rounded_along(weight, edit.read.to(weight), dtype))

        if places.apart or self.writer.kind != "experts" or len(shape) == 1:  # experts may share one bias
            tensor = edited(number, partial(self.checkpoint.tensor, place))
            return (tensor.T if places.turned else tensor).to(dtype)
        # One expert at a time: float64 copies of all would take four times the tensor's memory.
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
) -> WrittenShards:
    """Write the edited weights and copy the accompanying files; may be repeated after a crash.

    The result can prove what it has written. `own_code` also copies the model's own modules, which must be trusted.
    Raises ImpossibleJobError for a damaged source or if `folder` is the source, or MachineError.
    """
    if folder.resolve() == source.resolve():
        raise ImpossibleJobError(f"{folder} holds the base model", remedy="export to another folder")
    checkpoint = Checkpoint(source)
    checkpoint.require_writers(architecture)
    shards = WrittenShards(checkpoint, dict(edited_tensors(checkpoint, architecture, edit)), folder)
    try:
        make_folder(folder)
        (folder / DONE).unlink(missing_ok=True)
        for file in carried_files(source, code=own_code):
            write_atomically(folder / file.name, _companion(checkpoint, file))
        shards.write(advance)
        sync_folder(folder)
    except OSError as error:
        raise cannot_write(folder, error) from error
    return shards


def _companion(checkpoint: Checkpoint, file: Path) -> bytes:
    """Return what a file beside the weights says in an export, whose weights are plain."""
    if file.name == CONFIG:
        return plain_config(file.read_bytes(), dequantised=checkpoint.quantisation is not None)
    if checkpoint.quantisation is None or file.name != INDEX:
        return file.read_bytes()
    index: dict[str, Any] = json.loads(file.read_text())
    shards = {name: shard.name for shard, entries in checkpoint.entries.items() for name in entries}
    total = sum(checkpoint.entry(name).size for name in shards)
    index["metadata"] = {"total_size": total}
    index["weight_map"] = dict(sorted(shards.items()))
    return (json.dumps(index, indent=2) + "\n").encode()


def copy_licences(source: Path, folder: Path) -> None:
    """Copy the licence files into an export without other files of the model."""
    for name in licence_files(source):
        write_atomically(folder / name, (source / name).read_bytes())


def seal_made(
    folder: Path,
    made: Reproduction,
    source: Path,
    benchmarks: Benchmarks | None = None,
    known: Mapping[str, str] | None = None,
    detectors: DetectorReport | None = None,
) -> None:
    """Complete an export: reproduce.json with its weights' hashes, model card, picture, SHA256SUMS and manifest.

    `known` gives the SHA-256 of files that were proven, by name; the others are read.
    """

    def describe(weights: Mapping[str, str]) -> dict[str, bytes]:
        complete = made.model_copy(update={"weights": dict(weights)}).cleaned()
        tensors = _kept_tensors(source, folder) if made.format == "merged" else None
        card = model_card(complete, source, tensors, benchmarks, detectors)
        texts = {REPRODUCE: complete.model_dump_json(indent=2) + "\n", CARD: card}
        picture = card_picture(complete, title(complete))
        return {name: text.encode() for name, text in texts.items()} | {PICTURE: picture}

    seal(folder, describe, known)


def _kept_tensors(source: Path, folder: Path) -> int | None:
    """Return the number of tensors of the source's files, dequantised, if an export has all of them; else None."""
    names, kept = ({name for held in Checkpoint(at).entries.values() for name in held} for at in (source, folder))
    return len(names) if names == kept else None


def seal(
    folder: Path,
    describe: Callable[[Mapping[str, str]], Mapping[str, bytes]],
    known: Mapping[str, str] | None = None,
) -> None:
    """Complete an export: files from `describe` (given the weights' SHA-256), hashes, and last the manifest."""
    for name in (REPRODUCE, CARD, SUMS, MANIFEST):
        (folder / name).unlink(missing_ok=True)
    entries = dict(build_manifest(folder, known).files)
    weights = {name: entry.sha256 for name, entry in entries.items() if name.endswith(WEIGHTS)}
    for name, content in describe(weights).items():
        write_atomically(folder / name, content)
        entries[name] = _file_entry(folder / name)
    sums = "".join(f"{entries[name].sha256}  {name}\n" for name in sorted(entries))
    write_atomically(folder / SUMS, sums.encode())
    entries[SUMS] = _file_entry(folder / SUMS)
    write_record(folder / MANIFEST, Manifest(files=dict(sorted(entries.items()))))
    write_atomically(folder / DONE, (sha256_file(folder / MANIFEST) + "\n").encode())


def build_manifest(folder: Path, known: Mapping[str, str] | None = None) -> Manifest:
    """Return the manifest of a folder's current files; those with a `known` SHA-256 are not read."""
    names: Sequence[str] = sorted(
        path.name
        for path in folder.iterdir()
        if path.is_file() and not path.name.startswith(".") and path.name != MANIFEST
    )
    return Manifest(files={name: _file_entry(folder / name, (known or {}).get(name)) for name in names})


def _file_entry(path: Path, known: str | None = None) -> ManifestEntry:
    return ManifestEntry(sha256=known or sha256_file(path), size=path.stat().st_size)
