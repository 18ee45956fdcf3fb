"""Threads that send a file's parts in bounded memory."""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import SimpleQueue

# A thread that is inside a system call when everything ends is left behind after this time.
_LEAVE_SECONDS = 2.0


class Lanes:
    """Daemon threads that send parts from an equal number of buffers, which bounds memory."""

    def __init__(self, count: int, part_bytes: int, send: Callable[[int, memoryview], None]) -> None:
        self.stop = threading.Event()
        self._send = send
        self._failure: Exception | None = None
        self._free: SimpleQueue[bytearray] = SimpleQueue()
        self._work: SimpleQueue[tuple[int, bytearray, int] | None] = SimpleQueue()
        self._count = count
        for _ in range(count):
            self._free.put(bytearray(part_bytes))
        self._threads = [threading.Thread(target=self._run, name="s3-part", daemon=True) for _ in range(count)]

    def __enter__(self) -> Lanes:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self.stop.set()
        for _thread in self._threads:
            self._work.put(None)
        for thread in self._threads:
            thread.join(None if kind is None else _LEAVE_SECONDS / self._count)

    def _run(self) -> None:
        while (item := self._work.get()) is not None:
            number, buffer, length = item
            try:
                if not self.stop.is_set():
                    self._send(number, memoryview(buffer)[:length])
            except Exception as error:  # whatever it is, it is raised in the main thread
                if not self.stop.is_set():
                    self._failure = error
                self.stop.set()
            finally:
                self._free.put(buffer)

    def buffer(self) -> bytearray:
        """Return a free buffer, waiting for one; raises a part's permanent error."""
        free = self._free.get()
        if self._failure is not None:
            raise self._failure
        return free

    def send(self, number: int, buffer: bytearray, length: int) -> None:
        """Send a part from the start of a buffer, which is then freed."""
        self._work.put((number, buffer, length))

    def give_back(self, buffer: bytearray) -> None:
        """Return a buffer unused."""
        self._free.put(buffer)

    def finish(self) -> None:
        """Wait until everything has been sent; raises a part's permanent error."""
        for _ in range(self._count):
            self.buffer()
