"""Waits between tries, and their end."""

from __future__ import annotations

import time

import pytest

from job.system.retry import backoff_s, retried


def test_waits_double_up_to_the_longest_and_vary() -> None:
    for failures, longest in ((1, 0.5), (2, 1.0), (3, 2.0), (9, 60.0), (10_000, 60.0)):
        waits = [backoff_s(failures, 0.5, 60.0) for _ in range(200)]
        assert longest / 2 <= min(waits) < max(waits) <= longest


def test_a_call_is_made_again_after_the_wait_that_its_error_asks_for() -> None:
    seen: list[tuple[str, int]] = []

    def call() -> str:
        if len(seen) < 2:
            raise ConnectionError(f"try {len(seen)}")
        return "done"

    def wait_after(error: Exception, failures: int) -> float:
        seen.append((str(error), failures))
        return 0.05

    begun = time.monotonic()
    assert retried(call, wait_after) == "done"
    assert time.monotonic() - begun >= 0.1
    assert seen == [("try 0", 1), ("try 1", 2)]


def test_the_last_error_is_raised_or_a_clearer_one() -> None:
    def call() -> None:
        raise ConnectionError("as it was")

    def explain(error: Exception, _failures: int) -> None:
        raise ValueError("clearer") from error

    with pytest.raises(ConnectionError, match="as it was"):
        retried(call, lambda _error, failures: 0.0 if failures < 3 else None)
    with pytest.raises(ValueError, match="clearer"):
        retried(call, explain)
