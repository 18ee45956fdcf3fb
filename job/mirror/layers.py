"""Incremental upload of large growing files, such as study and event log.

A file is stored as layers: the first holds all of it, each later one the changed blocks. A new layer absorbs preceding
ones no larger than itself, so the number of layers is logarithmic in the file's size and the upload per trial stays
bounded. A layer is a JSON line listing its blocks, then the blocks, both compressed.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO

from job.mirror.records import Layered, MirroredFile

# Files that only grow, or change in few places.
LAYERED = frozenset({"study.db", "events.jsonl"})
# Also the size of SQLite's pages.
BLOCK = 4096
# Smaller files are sent whole: the saving would be less than the cost of an object.
SMALL_BYTES = 128 << 10
_MOST_LAYERS = 12
_MOST_HEADER = 1 << 20
_DIGEST = 16


@dataclass(frozen=True)
class _Known:
    """Sent contents: digest of each block, and the blocks of each layer."""

    digests: tuple[bytes, ...]
    layers: tuple[frozenset[int], ...]


class Layers:
    """Makes layers of one run folder's growing files; remembers digests of sent blocks."""

    def __init__(self) -> None:
        self._known: dict[str, dict[str, _Known]] = {}

    def make(self, path: str, source: Path, sha256: str, sent: MirroredFile | Layered | None, name: str) -> _Made:
        """Write the layer that updates a file from its mirrored entry (`sent`) to a copy (`source`).

        The layer is written beside the copy; `name` is the suffix of this snapshot's object names.
        """
        digests = _digests(source)
        known = self._known.get(path, {})
        before = known.get(sent.sha256) if isinstance(sent, Layered) else None
        size = source.stat().st_size
        layers = sent.layers if isinstance(sent, Layered) else ()
        kept: tuple[MirroredFile, ...] = ()
        # The end of a file that has shrunk remains in earlier layers.
        if before is None or sent is None or size < sent.size or len(before.layers) != len(layers):
            blocks = [frozenset(range(len(digests)))]
        else:
            blocks = _folded(before, digests)
            kept = layers[: len(blocks) - 1]
        file = source.with_name(source.name + ".layer")
        contents = _encoded(source, sorted(blocks[-1]))
        file.write_bytes(contents)
        layer_sha = hashlib.sha256(contents).hexdigest()
        layer = MirroredFile(sha256=layer_sha, size=len(contents), object=f"{layer_sha}.{name}")
        self._known[path] = {
            **({sent.sha256: before} if sent is not None and before is not None else {}),
            sha256: _Known(digests, tuple(blocks)),
        }
        return _Made(Layered(sha256=sha256, size=size, layers=(*kept, layer)), file, layer)


@dataclass(frozen=True)
class _Made:
    """A file's new entry, and the one layer to send."""

    entry: Layered
    source: Path
    layer: MirroredFile


def _digests(file: Path) -> tuple[bytes, ...]:
    with file.open("rb") as opened:
        return tuple(
            hashlib.blake2b(block, digest_size=_DIGEST).digest() for block in iter(lambda: opened.read(BLOCK), b"")
        )


def _folded(before: _Known, digests: Sequence[bytes]) -> list[frozenset[int]]:
    """Return the blocks of all layers, the last one new."""
    changed = {number for number, digest in enumerate(digests) if before.digests[number : number + 1] != (digest,)}
    layers = list(before.layers)
    while layers and (len(layers[-1]) <= len(changed) or len(layers) >= _MOST_LAYERS):
        changed |= layers.pop()
    if len(changed) == len(digests):
        layers.clear()  # fully covered by the new layer
    return [*layers, frozenset(changed)]


def _encoded(source: Path, blocks: Sequence[int]) -> bytes:
    runs = list(_runs(blocks))
    packer = zlib.compressobj()
    parts = [packer.compress(json.dumps(runs).encode() + b"\n")]
    with source.open("rb") as opened:
        for first, count in runs:
            opened.seek(first * BLOCK)
            parts.append(packer.compress(opened.read(count * BLOCK)))
    return b"".join([*parts, packer.flush()])


def _runs(blocks: Sequence[int]) -> Iterator[tuple[int, int]]:
    starts = [0, *(i + 1 for i, (a, b) in enumerate(pairwise(blocks)) if b != a + 1), len(blocks)]
    yield from ((blocks[start], end - start) for start, end in pairwise(starts) if end > start)


def assemble(layers: Collection[Path], target: Path, size: int) -> None:
    """Write a file of `size` bytes from its layers, oldest first, unverified. Raises ValueError."""
    with target.open("wb") as file:
        for layer in layers:
            _apply(layer.read_bytes(), file, size)


def _apply(layer: bytes, file: BinaryIO, size: int) -> None:
    unpacked = _Unpacked(layer)
    try:
        runs = json.loads(unpacked.line(_MOST_HEADER))
    except RecursionError as error:
        raise ValueError("no layer") from error
    if not _are_runs(runs):
        raise ValueError("no layer")
    for first, count in runs:
        if (first + count - 1) * BLOCK >= size:  # before writing anything: the size is unbounded
            raise ValueError("a layer is larger than its file")
        file.seek(first * BLOCK)
        for _ in range(count):
            if not (block := unpacked.take(BLOCK)):
                raise ValueError("a layer is cut short")
            file.write(block)
    if file.tell() > size or unpacked.take(1):
        raise ValueError("a layer is larger than its file")


class _Unpacked:
    """Bounded decompression, against compression bombs."""

    def __init__(self, packed: bytes) -> None:
        self._packed, self._unpacker, self._left = packed, zlib.decompressobj(), b""

    def take(self, count: int) -> bytes:
        """Return the next bytes, fewer at the end. Raises ValueError if they are damaged."""
        while len(self._left) < count and not self._unpacker.eof:
            try:
                more = self._unpacker.decompress(self._packed, max(count - len(self._left), BLOCK))
            except zlib.error as error:
                raise ValueError(str(error)) from error
            self._packed = self._unpacker.unconsumed_tail
            if not more and not self._packed and not self._unpacker.eof:
                raise ValueError("a layer is cut short")
            self._left += more
        found, self._left = self._left[:count], self._left[count:]
        return found

    def line(self, most: int) -> bytes:
        """Read up to and including the first line feed. Raises ValueError if there is none within the limit."""
        found = b""
        while b"\n" not in found:
            more = self.take(BLOCK)
            if not more or len(found) > most:
                raise ValueError("no layer")
            found += more
        line, _, rest = found.partition(b"\n")
        self._left = rest + self._left
        return line


def _are_runs(runs: object) -> bool:
    """Return whether these are runs of blocks in order: each block is written once, so a layer takes bounded time."""
    end = 0
    for run in runs if isinstance(runs, list) else [()]:
        if not (isinstance(run, list) and len(run) == 2 and all(type(number) is int for number in run)):
            return False
        first, count = run
        if first < end or count < 1:
            return False
        end = first + count
    return True
