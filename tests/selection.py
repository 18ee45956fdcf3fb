"""A pytest plugin that selects and orders tests and records their results (rules: tests/lanes.py)."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from tests import lanes


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("lanes", "the full lane (tests/lanes.py)")
    group.addoption("--full-parts", help="of the full lane, run these parts (a,b) and a sample of the others' tests")
    group.addoption("--sample-seed", type=int, default=0, help="the seed of that sample")
    group.addoption("--results", type=Path, help="write what became of each test to this file")


def pytest_configure(config: pytest.Config) -> None:
    file = config.getoption("results")
    if file is not None and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Results(file))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect tests of the full lane that CI does not need; start with the slow ones."""
    full: dict[str, str] = {}
    for item in items:
        lane = lane_of(item)
        item.user_properties.append(("lane", lane))
        if item.get_closest_marker("full"):
            full[item.nodeid] = lane if lane != "test" else ""
    parts = config.getoption("full_parts")
    if parts is not None:
        wanted = lanes.chosen(full, parts.split(","), config.getoption("sample_seed"))
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid not in wanted])
        items[:] = [item for item in items if item.nodeid in wanted]
    tests = [lanes.Placed(item.nodeid, group_of(item), bool(item.get_closest_marker("slow"))) for item in items]
    items[:] = [items[index] for index in lanes.ordered(tests, lanes.read_durations())]


def lane_of(item: pytest.Item) -> str:
    """Return a test's part of the full lane, "test" if none."""
    marker = item.get_closest_marker("full")
    if marker is None or not marker.args:
        return "test"
    (part,) = marker.args
    if part not in lanes.PARTS:
        raise pytest.UsageError(f"{item.nodeid}: the full lane has no part {part!r}, only {', '.join(lanes.PARTS)}")
    return str(part)


def group_of(item: pytest.Item) -> str:
    marker = item.get_closest_marker("xdist_group")
    return str(marker.args[0]) if marker else ""


class Results:
    """Collects the results of all tests and writes them to a file at the end."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._outcomes: dict[str, lanes.Outcome] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        node = lanes.plain_node(report.nodeid)
        before = self._outcomes.get(node, lanes.Outcome("", True, 0.0))
        self._outcomes[node] = lanes.Outcome(
            # A test that killed its worker reports nothing.
            lane=dict(report.user_properties).get("lane", before.lane),
            passed=before.passed and report.passed,
            seconds=report.duration if report.when == "call" else before.seconds,
        )

    def pytest_sessionfinish(self) -> None:
        found = {node: dataclasses.asdict(outcome) for node, outcome in self._outcomes.items()}
        self._file.write_text(json.dumps(found))
