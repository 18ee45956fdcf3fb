"""An export's files of weights: written in parallel, hashed while they are written, and read back once.

Only edited and dequantised tensors are computed, one at a time; all others pass through in blocks.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import CancelledError, Executor, ThreadPoolExecutor, as_completed
from pathlib import Path

import torch
from torch import Tensor

from job.errors import ExportMismatchError
from job.model.safetensors_files import Checkpoint, blocks_of, digest_of
from job.system.failpoints import reached

# Files under way at once. SHA-256 takes 1 to 2 GB/s of one core, which is less than a fast disk.
_FILES = 4
# Computed tensors in memory at once: one being computed, one being written.
_TENSORS = 2
_REMEDY = "check the disk and run again"


class WrittenShards:
    """The files of weights of an edited checkpoint in another folder.

    Attributes:
        hashes: SHA-256 of what was written, by file name.
    """

    def __init__(self, checkpoint: Checkpoint, edited: Mapping[str, Callable[[], Tensor]], folder: Path) -> None:
        """Take the checkpoint, a function for each stored tensor that changes, and the folder to write to."""
        self._checkpoint, self._edited, self._folder = checkpoint, edited, folder
        self.hashes: dict[str, str] = {}
        self._held, self._stop = threading.BoundedSemaphore(_TENSORS), threading.Event()

    def write(self, advance: Callable[[int], None]) -> None:
        """Write all files; may be repeated after a crash. Raises OSError."""
        self._for_each_file(self._write, advance)

    def verify(self, advance: Callable[[int], None] = lambda _: None) -> None:
        """Read all files back. Raises ExportMismatchError unless they hold what was written."""
        self._for_each_file(self._verify, advance)

    def _for_each_file(self, work: Callable[[Path, Executor], None], advance: Callable[[int], None]) -> None:
        self._stop.clear()
        # Tensors are computed in one thread: the allocator keeps freed memory for the thread that had it.
        computing = ThreadPoolExecutor(1, thread_name_prefix="shard-tensors")
        with computing, ThreadPoolExecutor(_FILES, thread_name_prefix="shard") as pool:
            running = [pool.submit(work, file, computing) for file in self._checkpoint.files]
            try:
                for future in as_completed(running):
                    future.result()
                    advance(1)
            except BaseException:  # a stop signal, too
                self._stop.set()
                pool.shutdown(cancel_futures=True)
                raise

    def _require_time(self) -> None:
        if self._stop.is_set():
            raise CancelledError  # another file has failed, or the job is being stopped

    def _write(self, file: Path, computing: Executor) -> None:
        digest = hashlib.sha256()
        partial = self._folder / f".{file.name}.partial"
        with partial.open("wb") as stream:
            header = self._checkpoint.header(file)
            digest.update(header)
            stream.write(header)
            reached("shard:begun")
            entries = self._checkpoint.entries[file]
            for name in sorted(entries, key=lambda name: entries[name].start):
                for block in self._blocks(name, computing):
                    digest.update(block)
                    stream.write(block)
                    del block  # before the next tensor is computed
            stream.flush()
            os.fsync(stream.fileno())
        reached("shard:written")
        partial.replace(self._folder / file.name)
        reached("shard:replaced")
        self.hashes[file.name] = digest.hexdigest()

    def _blocks(self, name: str, computing: Executor) -> Iterator[bytes | memoryview]:
        """Yield a tensor's bytes."""
        if name not in self._edited and not self._checkpoint.is_dequantised(name):
            for block in self._checkpoint.stored_blocks(name):
                self._require_time()
                yield block
            return
        with self._held:
            yield computing.submit(self._computed, name).result()

    def _computed(self, name: str) -> memoryview:
        self._require_time()
        if name in self._edited:
            return _bytes(self._edited[name]())
        return _bytes(self._checkpoint.tensor(name, self._checkpoint.dtype(name)))

    def _verify(self, file: Path, computing: Executor) -> None:
        digest, copy = hashlib.sha256(), self._folder / file.name
        try:
            for block in blocks_of(copy):
                self._require_time()
                digest.update(block)
        except OSError as error:
            reason = f"{copy} cannot be read back: {error.strerror}"
            raise ExportMismatchError(reason, remedy=_REMEDY) from error
        if digest.hexdigest() != self.hashes[file.name]:
            damaged = self._damaged_part(file, copy, computing)
            raise ExportMismatchError(f"{damaged} does not hold what was written", remedy=_REMEDY)

    def _damaged_part(self, file: Path, copy: Path, computing: Executor) -> str:
        """Return which tensor of a file differs, or the file."""
        for name, entry in self._checkpoint.entries[file].items():
            expected = hashlib.sha256()
            for block in self._blocks(name, computing):
                expected.update(block)
            if digest_of(copy, entry) != expected.digest():
                return f"tensor {name} in {copy}"
        return str(copy)


def _bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.contiguous().view(torch.uint8).numpy()).cast("B")
