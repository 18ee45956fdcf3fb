"""Periodic work beside the main thread."""

from __future__ import annotations

import threading

import pytest

from job.system.periodic import every


def test_it_is_done_again_and_again_until_the_block_ends() -> None:
    done, third = 0, threading.Event()

    def act() -> None:
        nonlocal done
        done += 1
        if done == 3:
            third.set()

    with every(0.01, act, "counter"):
        assert third.wait(10)
        assert "counter" in {thread.name for thread in threading.enumerate()}
    after = done
    assert "counter" not in {thread.name for thread in threading.enumerate()}
    assert not threading.Event().wait(0.05)
    assert done == after


def test_it_ends_with_a_block_that_raises() -> None:
    with pytest.raises(ZeroDivisionError), every(0.01, list, "counter"):
        _ = 1 // 0
    assert "counter" not in {thread.name for thread in threading.enumerate()}
