"""Work in threads that are left behind after a failure."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from job.system.threads import in_threads
from tests.helpers import environment


def test_every_item_is_done_once_and_several_at_a_time() -> None:
    together, results = threading.Barrier(3), list[int]()

    def act(item: int) -> int:
        together.wait(10)  # passes only where three are under way
        return item * item

    here = threading.get_ident()
    callers = set()

    def then(result: int) -> None:
        callers.add(threading.get_ident())
        results.append(result)

    in_threads(act, range(30), 3, then, "squares")
    assert sorted(results) == [item * item for item in range(30)]
    assert callers == {here}


def test_no_more_items_are_drawn_than_are_under_way() -> None:
    drawn, done, most = 0, 0, 0

    def items() -> Iterator[int]:
        nonlocal drawn, most
        for item in range(50):
            drawn += 1
            most = max(most, drawn - done)
            threading.Event().wait(0.002)  # long enough for another thread to draw as well
            yield item

    def act(item: int) -> int:
        nonlocal done
        with lock:
            done += 1
        return item

    lock = threading.Lock()
    in_threads(act, items(), 4, lambda _: None, "few")
    assert (drawn, done) == (50, 50)
    assert most <= 4


@pytest.mark.parametrize("place", ["act", "items", "then"])
def test_after_a_failure_nothing_further_is_begun(place: str) -> None:
    begun: list[int] = []

    def items() -> Iterator[int]:
        for item in range(1000):
            if place == "items" and item == 5:
                raise ZeroDivisionError
            yield item

    def act(item: int) -> int:
        begun.append(item)
        if place == "act" and item == 5:
            raise ZeroDivisionError
        threading.Event().wait(0.01)
        return item

    def then(item: int) -> None:
        if place == "then" and item >= 5:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        in_threads(act, items(), 2, then, "failing")
    assert len(begun) < 20
    assert not [thread for thread in threading.enumerate() if thread.name == "failing"]


def test_a_thread_that_hangs_does_not_hold_up_the_end_of_the_process() -> None:
    code = """
import threading
from job.system.threads import in_threads
def act(item):
    if item:
        raise KeyError(item)
    threading.Event().wait(60)
try:
    in_threads(act, [0, 1], 2, print, "hanging")
except KeyError:
    print("left")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, env=environment())
    assert (done.returncode, done.stdout) == (0, "left\n"), done.stderr
