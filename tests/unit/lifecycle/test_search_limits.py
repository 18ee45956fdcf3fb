"""The end of a search by its budget: time for the finalists is kept, as for the export."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from job.lifecycle import search_limits
from job.lifecycle.search_limits import SearchLimits
from job.search.budget import Budget, Meter


@pytest.mark.parametrize(("finalists", "batches"), [(0.0, 9), (3.0, 6), (50.0, 1)])
def test_a_search_ends_while_there_is_time_to_measure_finalists(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, finalists: float, batches: int
) -> None:
    """The budget is 360 s, the export takes 36 s and a batch 36 s: nine batches fit without finalists."""
    now = 0.0
    monkeypatch.setattr(search_limits, "time", SimpleNamespace(monotonic=lambda: now))
    meter = Meter(tmp_path / "meter.json", None, lambda: now)
    budget = Budget(meter, max_hours=0.1, max_cost=None, price=None, reserve=0.0099)
    hold: Any = SimpleNamespace(check=lambda: None, keep=lambda: None)
    signals: Any = SimpleNamespace(graceful=lambda _: nullcontext())
    limits = SearchLimits(budget, hold, signals, 5.0, begun=False, finalists=finalists)
    done = 0
    while limits.may_go_on():
        with limits.batch():
            now += 36.0
        done += 1
    assert done == batches
