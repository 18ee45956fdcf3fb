"""An export's files of weights: written in parallel, hashed while they are written, and read back once.

Only edited and dequantised tensors are computed, one at a time; all others pass through in blocks.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue

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


@dataclass(frozen=True)
class _Request:
    """A thread's wish for a tensor's bytes."""

    name: str
    tensor: Future[memoryview] = field(default_factory=Future)


class WrittenShards:
    """The files of weights of an edited checkpoint in another folder.

    Attributes:
        hashes: SHA-256 of what was written, by file name.
    """

    def __init__(self, checkpoint: Checkpoint, edited: Mapping[str, Callable[[], Tensor]], folder: Path) -> None:
        """Take the checkpoint, a function for each stored tensor that changes, and the folder to write to."""
        self._checkpoint, self._edited, self._folder = checkpoint, edited, folder
        self.hashes: dict[str, str] = {}
        self._events: SimpleQueue[_Request | Future[None]] = SimpleQueue()
        self._held, self._stop = threading.BoundedSemaphore(_TENSORS), threading.Event()

    def write(self, advance: Callable[[int], None]) -> None:
        """Write all files; may be repeated after a crash. Raises OSError."""
        self._for_each_file(self._write, advance)

    def verify(self, advance: Callable[[int], None] = lambda _: None) -> None:
        """Read all files back. Raises ExportMismatchError unless they hold what was written."""
        self._for_each_file(self._verify, advance)

    def _for_each_file(self, work: Callable[[Path], None], advance: Callable[[int], None]) -> None:
        """Run `work` for all files in threads, and compute the tensors that they ask for here.

        Computed in threads, tensors would take more memory: an allocator keeps for each thread what that has freed.
        """
        self._stop.clear()
        self._events = SimpleQueue()
        with ThreadPoolExecutor(_FILES, thread_name_prefix="shard") as pool:
            try:
                for file in self._checkpoint.files:
                    pool.submit(work, file).add_done_callback(self._events.put)
                left = len(self._checkpoint.files)
                while left:
                    done = self._handle(self._events.get())
                    left -= done
                    if done:
                        advance(1)
            except BaseException:  # a stop signal, too
                self._stop.set()
                while not self._events.empty():
                    event = self._events.get()
                    (event.tensor if isinstance(event, _Request) else event).cancel()
                pool.shutdown(cancel_futures=True)
                raise

    def _handle(self, event: _Request | Future[None]) -> bool:
        """Compute a tensor or, if a file is done, return True. Raises what has ended its thread."""
        if not isinstance(event, _Request):
            event.result()
            return True
        try:
            event.tensor.set_result(_bytes(self._computed(event.name)))
        finally:
            event.tensor.cancel()  # without a result
        return False

    def _require_time(self) -> None:
        if self._stop.is_set():
            raise CancelledError  # another file has failed, or the job is being stopped

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
        if name not in self._edited and not self._checkpoint.is_dequantised(name):
            for block in self._checkpoint.stored_blocks(name):
                self._require_time()
                yield block
            return
        with self._held:
            yield self._asked_for(name)

    def _asked_for(self, name: str) -> memoryview:
        request = _Request(name)
        self._events.put(request)
        self._require_time()  # once that has passed, the request is answered or cancelled
        return request.tensor.result()

    def _computed(self, name: str) -> Tensor:
        if name in self._edited:
            return self._edited[name]()
        return self._checkpoint.tensor(name, self._checkpoint.dtype(name))

    def _verify(self, file: Path) -> None:
        digest, copy = hashlib.sha256(), self._folder / file.name
        try:
            for block in blocks_of(copy):
                self._require_time()
                digest.update(block)
        except OSError as error:
            reason = f"{copy} cannot be read back: {error.strerror}"
            raise ExportMismatchError(reason, remedy=_REMEDY) from error
        if digest.hexdigest() != self.hashes[file.name]:
            damaged = self._damaged_part(file, copy)
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
