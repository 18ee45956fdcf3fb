"""Parameters in a model's safetensors files: names, types and positions.

Quantised files appear as the plain ones of an export: same file names, dequantised tensors, no scales.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
import struct
import sys
from collections.abc import Collection, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from job.architectures.spec import Architecture
from job.architectures.tensor_names import Form
from job.errors import ImpossibleJobError, UnsupportedArchitectureError
from job.model.config_file import model_config
from job.model.quantization import PlainTensor, Quantisation, block_of, plain_tensors, quantisation_in
from job.model.safetensors_header import TensorEntry, header_bytes, read_header
from job.model.weight_files import checkpoint_files
from job.numerics.dequantisation import dequantised_blocks, dequantised_mxfp4

_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_SIZES = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2}
_BLOCK = 1 << 20
# What configurations call the number of layers for multi-token prediction.
_EXTRA_HEADS = re.compile(r"nextn|mtp")


@dataclass(frozen=True)
class Places:
    """Stored tensors of a parameter.

    Attributes:
        apart: They are one expert's each, in order.
        turned: They are transposed relative to the loaded model.
    """

    names: tuple[str, ...]
    apart: bool = False
    turned: bool = False


def places_among(held: Container[str], architecture: Architecture, name: str) -> Places:
    """Return a parameter's stored tensors among `held` names. Raises UnsupportedArchitectureError if missing."""
    form = architecture.forms.get(name, Form(name))
    for known in (form.name, name, name.removeprefix(f"{architecture.prefix}.")):
        if known in held:
            return Places((known,))
    numbered = map(form.name.format, itertools.count() if form.apart else ())
    found = tuple(itertools.takewhile(held.__contains__, numbered))
    if not found:
        raise UnsupportedArchitectureError(architecture.model_type, f"its files hold no tensor {form.name.format(0)}")
    return Places(found, apart=True, turned=form.turned)


def require_sizes(held: Mapping[str, Sequence[int]], architecture: Architecture, model: nn.Module) -> None:
    """Raise UnsupportedArchitectureError for a missing writer, or ImpossibleJobError for an unexpected size."""
    for name in (name for writer in architecture.writers for name in writer.edited):
        shape = tuple(model.get_parameter(name).shape)
        names = places_among(held, architecture, name).names
        # However files turn or divide it.
        if sum(math.prod(held[place]) for place in names) != math.prod(shape):
            raise ImpossibleJobError(
                f"{names[0]} has the shape {list(held[names[0]])} in the files, "
                f"but config.json asks for {name} of {list(shape)}",
                remedy="obtain an undamaged copy of the model",
            )


def require_declared_layers(held: Collection[str], architecture: Architecture, config: Mapping[str, Any]) -> None:
    """Raise ImpossibleJobError if files hold layers that the configuration does not name: loading would drop them.

    Layers that it names as extra heads (multi-token prediction) are not loaded, but may be there.
    """
    writer = architecture.writers[0]
    place = places_among(held, architecture, writer.parameter).names[0]
    layers, found, _ = place.partition(f".{writer.layer}.")
    numbers = {name.removeprefix(f"{layers}.").partition(".")[0] for name in held if name.startswith(f"{layers}.")}
    there = 1 + max((int(number) for number in numbers if number.isdecimal()), default=-1)
    values = {**config, **(config.get("text_config") or {})}
    extra = [value for key, value in values.items() if _EXTRA_HEADS.search(key) and type(value) is int]
    if found and there > architecture.layer_count + max(extra, default=0):
        raise ImpossibleJobError(
            f"the files hold {there} layers, but config.json names {architecture.layer_count}",
            remedy="take config.json and weights from the same model",
        )


class Checkpoint:
    """A model's safetensors files.

    Attributes:
        entries: Tensors of each file's plain copy, by name.
        quantisation: Quantisation of the files, or None.
    """

    def __init__(self, folder: Path) -> None:
        """Read the headers of all files. Raises ImpossibleJobError."""
        self.folder = folder
        self._stored = {file: read_header(file) for file in checkpoint_files(folder)}
        self._source = {name: file for file, entries in self._stored.items() for name in entries}
        self.quantisation = quantisation_in(folder)
        self._made: dict[str, PlainTensor] = {}
        self._headers: dict[Path, bytes] = {}
        self.entries: Mapping[Path, Mapping[str, TensorEntry]] = self._stored
        if self.quantisation is not None:
            self.entries = self._dequantised_layout(self.quantisation)
        self._file_of = {name: file for file, entries in self.entries.items() for name in entries}

    @property
    def files(self) -> list[Path]:
        """The files, except those that are empty after dequantisation."""
        return list(self.entries)

    def header(self, file: Path) -> bytes:
        """Return the header of a file's plain copy, with the length before it."""
        return self._headers.get(file) or header_bytes(file)

    def is_dequantised(self, name: str) -> bool:
        """Return whether a tensor is stored quantised."""
        return name in self._made

    def tensor(self, name: str, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return a tensor as stored, or dequantised to a type."""
        made = self._made.get(name)
        if made is None:
            return self._read(name)
        if self.quantisation is not None and self.quantisation.method == "mxfp4":
            # One expert at a time: what is computed on the way would take as much again.
            found = torch.empty(made.shape, dtype=dtype)
            for number, expert in enumerate(found):
                expert.copy_(self.part(name, number, dtype))
            return found
        values, scales = map(self._read, made.parts)
        named = self.quantisation.block if self.quantisation is not None else None
        return dequantised_blocks(values, scales, block_of(values.shape, scales.shape, named), dtype)

    def part(self, name: str, number: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return one entry of a tensor's first axis, as stored or dequantised to a type."""
        made = self._made.get(name)
        if made is None:
            return self._read(name, number)
        if len(made.shape) == 3:
            blocks, exponents = (self._read(part, number) for part in made.parts)
            return dequantised_mxfp4(blocks, exponents, dtype)
        return self.tensor(name, dtype)[number]

    def _read(self, name: str, number: int | None = None) -> Tensor:
        with safe_open(self._source[name], framework="pt") as file:
            tensor: Tensor = file.get_tensor(name) if number is None else file.get_slice(name)[number]
        return tensor

    def entry(self, name: str) -> TensorEntry:
        """Return a tensor's entry in the plain files."""
        return self.entries[self._file_of[name]][name]

    def dtype(self, name: str) -> torch.dtype:
        """Return a tensor's floating-point type after dequantisation."""
        return _FLOATS[self.entry(name).dtype]

    def stored_blocks(self, name: str) -> Iterator[memoryview]:
        """Yield the bytes of an unquantised tensor."""
        entry = self._stored[self._source[name]][name]
        yield from blocks_of(self._source[name], entry.start, entry.size)

    def places(self, architecture: Architecture, name: str) -> Places:
        """Return a parameter's stored tensors. Raises UnsupportedArchitectureError if missing."""
        return places_among(self._file_of, architecture, name)

    def keeps(self, architecture: Architecture, dtype: torch.dtype) -> bool:
        """Return whether all tensors of edits have at least the precision of a type."""
        digits = torch.finfo(dtype).eps
        return all(torch.finfo(self.dtype(name)).eps <= digits for name in self._writer_tensor_names(architecture))

    def require_writers(self, architecture: Architecture) -> None:
        """Refuse a checkpoint that lacks a residual writer as a floating-point tensor.

        Raises UnsupportedArchitectureError, or ImpossibleJobError for more layers than its configuration names.
        """
        for name in self._writer_tensor_names(architecture):
            dtype = self.entry(name).dtype
            if dtype not in _FLOATS:
                raise UnsupportedArchitectureError(
                    architecture.model_type, f"tensor {name} is stored as {dtype}; quantised files cannot be edited"
                )
        require_declared_layers(self._file_of, architecture, model_config(self.folder))

    def digest(self, architecture: Architecture) -> str:
        """Return a hash of all tensors that an edit changes or depends on."""
        digest = hashlib.sha256()
        for name in self._writer_tensor_names(architecture):
            for part in self._made[name].parts if name in self._made else (name,):
                file = self._source[part]
                digest.update(digest_of(file, self._stored[file][part]))
        return digest.hexdigest()

    def _writer_tensor_names(self, architecture: Architecture) -> Iterator[str]:
        for writer in architecture.writers:
            for name in writer.tensors:
                yield from self.places(architecture, name).names

    def _dequantised_layout(self, quantisation: Quantisation) -> dict[Path, dict[str, TensorEntry]]:
        """Return the tensors of the plain files, each in the file of its values."""
        stored = {name: entry for entries in self._stored.values() for name, entry in entries.items()}
        headers = {name: (entry.dtype, entry.shape) for name, entry in stored.items()}
        by_file: dict[Path, dict[str, tuple[str, tuple[int, ...], int]]] = {}
        for plain in plain_tensors(quantisation, headers):
            size = stored[plain.name].size if plain.name in stored else 0
            if plain.parts != (plain.name,):
                self._made[plain.name] = plain
                size = _SIZES[plain.dtype] * torch.Size(plain.shape).numel()
            by_file.setdefault(self._source[plain.parts[0]], {})[plain.name] = (plain.dtype, plain.shape, size)
        layout = {}
        for file in self._stored:
            if file in by_file:
                self._headers[file], layout[file] = _header_and_entries(by_file[file])
        return layout


def _header_and_entries(
    tensors: Mapping[str, tuple[str, tuple[int, ...], int]],
) -> tuple[bytes, dict[str, TensorEntry]]:
    """Return a safetensors header and its tensors' positions, widest types first as usual."""
    order = sorted(tensors, key=lambda name: (-_SIZES.get(tensors[name][0], 1), name))
    offsets: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name in order:
        dtype, shape, size = tensors[name]
        offsets[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, position + size]}
        position += size
    described = json.dumps(offsets, separators=(",", ":")).encode()
    described += b" " * (-len(described) % 8)
    header = struct.pack("<Q", len(described)) + described
    starts = {name: len(header) + offsets[name]["data_offsets"][0] for name in order}
    return header, {name: TensorEntry(*tensors[name][:2], starts[name], tensors[name][2]) for name in order}


def digest_of(file: Path, entry: TensorEntry) -> bytes:
    """Return the SHA-256 of a tensor's bytes in a file."""
    digest = hashlib.sha256()
    for block in blocks_of(file, entry.start, entry.size):
        digest.update(block)
    return digest.digest()


def blocks_of(file: Path, start: int = 0, size: int | None = None) -> Iterator[memoryview]:
    """Yield `size` bytes of a file from `start` on, or all that follow, in blocks of 1 MiB.

    A block is valid until the next one: all are read into one buffer.
    """
    block = memoryview(bytearray(_BLOCK))
    with file.open("rb", buffering=0) as stream:
        stream.seek(start)
        left = sys.maxsize if size is None else size
        while left and (count := stream.readinto(block[: min(_BLOCK, left)])):
            yield block[:count]
            left -= count
