"""An export's files of weights: hashed while they are written, and read back once.

Only edited and dequantised tensors are computed, one at a time; all others pass through in blocks.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from job.errors import ExportMismatchError
from job.model.safetensors_files import Checkpoint, blocks_of, digest_of
from job.system.failpoints import reached

_REMEDY = "check the disk and run again"


class WrittenShards:
    """The files of weights of an edited checkpoint in another folder.

    Attributes:
        hashes: SHA-256 of what was written, by file name.
    """

    def __init__(self, checkpoint: Checkpoint, edited: Mapping[str, Callable[[], Tensor]], folder: Path) -> None:
        """Take the checkpoint, a function for each stored tensor that changes, and the folder to write to."""
        self._checkpoint, self._edited, self._folder = checkpoint, edited, folder
        self._sources = self._states()
        self.hashes: dict[str, str] = {}

    def write(self, advance: Callable[[int], None]) -> None:
        """Write all files; may be repeated after a crash. Raises OSError."""
        self._for_each_file(self._write, advance)

    def verify(self, advance: Callable[[int], None] = lambda _: None) -> None:
        """Read all files back. Raises ExportMismatchError unless they hold what was written of an unchanged source."""
        self._for_each_file(self._verify, advance)
        if self._sources != self._states():
            raise ExportMismatchError("the model's files changed while they were read", remedy="run again")

    def _states(self) -> list[tuple[int, int, int]]:
        """Return what changes with a source file's contents; its bytes are read once, so this stands for them."""
        found = [file.stat() for file in self._checkpoint.files]
        return [(one.st_ino, one.st_size, one.st_mtime_ns) for one in found]

    def _for_each_file(self, work: Callable[[Path], None], advance: Callable[[int], None]) -> None:
        for file in self._checkpoint.files:
            work(file)
            advance(1)

    def _write(self, file: Path) -> None:
        digest = hashlib.sha256()
        partial = self._folder / f".{file.name}.partial"
        with partial.open("wb") as stream:
            header = self._checkpoint.header(file)
            digest.update(header)
            stream.write(header)
            reached("shard:begun")
            entries = self._checkpoint.entries[file]
            for name in sorted(entries, key=lambda name: entries[name].start):
                for block in self._blocks(name):
                    digest.update(block)
                    stream.write(block)
                    del block  # before the next tensor is computed
            stream.flush()
            os.fsync(stream.fileno())
        reached("shard:written")
        partial.replace(self._folder / file.name)
        reached("shard:replaced")
        self.hashes[file.name] = digest.hexdigest()

    def _blocks(self, name: str) -> Iterator[bytes | memoryview]:
        """Yield a tensor's bytes."""
        if name in self._edited or self._checkpoint.is_dequantised(name):
            yield _bytes(self._computed(name))
        else:
            yield from self._checkpoint.stored_blocks(name)

    def _computed(self, name: str) -> Tensor:
        if name in self._edited:
            return self._edited[name]()
        return self._checkpoint.tensor(name, self._checkpoint.dtype(name))

    def _verify(self, file: Path) -> None:
        digest, copy = hashlib.sha256(), self._folder / file.name
        try:
            for block in blocks_of(copy):
                digest.update(block)
            damaged = None if digest.hexdigest() == self.hashes[file.name] else self._damaged_part(file, copy)
        except OSError as error:
            reason = f"{copy} cannot be read back: {error.strerror}"
            raise ExportMismatchError(reason, remedy=_REMEDY) from error
        if damaged is not None:
            raise ExportMismatchError(f"{damaged} does not hold what was written", remedy=_REMEDY)

    def _damaged_part(self, file: Path, copy: Path) -> str:
        """Return which tensor of a file differs, or the file."""
        for name, entry in self._checkpoint.entries[file].items():
            expected = hashlib.sha256()
            for block in self._blocks(name):
                expected.update(block)
            if digest_of(copy, entry) != expected.digest():
                return f"tensor {name} in {copy}"
        return str(copy)


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.contiguous().view(torch.uint8).numpy().data
