"""Threads that send the parts of a file, in bounded memory."""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import SimpleQueue

# A thread that is inside a system call when everything ends is left behind after this time.
_LEAVE_SECONDS = 2.0


class Lanes:
    """Threads that send parts from as many buffers: no more than that is ever held in memory.

    The threads are daemons, so that one that hangs in a dead connection cannot keep the process.
    """

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
        """Return a free buffer, waiting for one.

        Raises:
            Exception: What made a part fail for good.
        """
        free = self._free.get()
        if self._failure is not None:
            raise self._failure
        return free

    def send(self, number: int, buffer: bytearray, length: int) -> None:
        """Have a part sent that lies at the start of a buffer, which is free again afterwards."""
        self._work.put((number, buffer, length))

    def give_back(self, buffer: bytearray) -> None:
        """Return a buffer unused."""
        self._free.put(buffer)

    def finish(self) -> None:
        """Wait until everything has been sent.

        Raises:
            Exception: What made a part fail for good.
        """
        for _ in range(self._count):
            self.buffer()
