"""Work in several threads that do not hold up the end of the process."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from itertools import islice
from queue import SimpleQueue
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


# A thread that is still at work when the others end is left behind after this time.
_LEAVE_S = 2.0


def in_threads(
    act: Callable[[T], R],
    items: Iterable[T],
    count: int,
    then: Callable[[R], object],
    name: str,
    ended: threading.Event | None = None,
) -> None:
    """Call `act` with every item in `count` daemon threads, and `then` in this one with every result, as they come.

    A thread draws its next item once its last is done. After an exception, here or in a thread, no further item is
    begun, `ended` is set, and threads are waited for no longer than two seconds. Python would wait for those of
    `concurrent.futures` when the process ends.
    """
    ended = ended or threading.Event()
    left, drawing = iter(items), threading.Lock()
    results: SimpleQueue[tuple[list[R], BaseException | None]] = SimpleQueue()

    def draw() -> list[T]:
        with drawing:
            return [] if ended.is_set() else list(islice(left, 1))

    def work() -> None:
        try:
            while item := draw():
                results.put(([act(item.pop())], None))  # popped: memory of an item is freed before the next is drawn
            results.put(([], None))
        except BaseException as error:  # the caller's thread raises it
            results.put(([], error))

    threads: list[threading.Thread] = []
    running = count
    try:
        for _ in range(count):
            thread = threading.Thread(target=work, name=name, daemon=True)
            thread.start()
            threads.append(thread)
        while running:
            result, error = results.get()
            if error is not None:
                raise error
            running -= not result
            for one in result:
                then(one)
    finally:
        ended.set()
        end = time.monotonic() + _LEAVE_S
        for thread in threads:
            thread.join(max(end - time.monotonic(), 0.0))
