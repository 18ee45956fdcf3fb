"""Which tests of the full lane a change needs, what is recorded of them, and in which order tests run."""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests import lanes
from tests.lanes import PARTS, ROOT, Outcome, Part, Placed, changed, chosen, digest, inputs, ordered, passed
from tests.selection import Results

COPIED = (
    *("benchmarks", "job", "tests", "infra", "Dockerfile", ".dockerignore"),
    *("entrypoint.sh", "constraints.txt", "pyproject.toml"),
)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a copy of the project, which tests change and restore."""
    folder = tmp_path_factory.mktemp("tree")
    for name in COPIED:
        source = ROOT / name
        unwanted = shutil.ignore_patterns("__pycache__", "fixtures")
        shutil.copytree(source, folder / name, ignore=unwanted) if source.is_dir() else shutil.copy(source, folder)
    return folder


def parts_changed_by(tree: Path, file: str, change: Callable[[bytes], bytes] = lambda old: old + b"\n") -> set[str]:
    """Return the parts that have a changed file among their inputs."""
    before = {name: digest(part, tree) for name, part in PARTS.items()}
    old = (tree / file).read_bytes()
    try:
        (tree / file).write_bytes(change(old))
        return set(changed({name: digest(part, tree) for name, part in PARTS.items()}, before))
    finally:
        (tree / file).write_bytes(old)


@pytest.mark.parametrize(
    ("file", "parts"),
    [
        ("constraints.txt", {"image"}),
        ("Dockerfile", {"image"}),
        ("entrypoint.sh", {"image"}),
        ("job/numerics/ablation.py", {"families", "organisms", "checkpoints", "real", "fuzz", "kills"}),
        ("job/architectures/spec.py", {"families", "organisms", "checkpoints", "real", "fuzz", "kills"}),
        ("job/export/merged.py", {"families", "organisms", "checkpoints", "real", "kills"}),
        ("tests/decoders.py", {"families"}),
        ("job/organism/training.py", {"organisms"}),
        ("job/realmodel/prompts/bad.txt", {"real"}),
        ("job/search/study.py", {"kills"}),
        ("job/mirror/lease.py", {"kills"}),
        ("job/report/charts.py", set()),
    ],
)
def test_a_change_needs_the_parts_that_depend_on_it(tree: Path, file: str, parts: set[str]) -> None:
    assert parts_changed_by(tree, file) == parts


def test_what_is_imported_counts_wherever_the_import_stands(tmp_path: Path) -> None:
    (tmp_path / "job").mkdir()
    for name, text in {
        "a": "def f():\n    from job import b\n",
        "b": "import job.c as other\n",
        "c": "import os\n",
        "d": "",
    }.items():
        (tmp_path / "job" / f"{name}.py").write_text(text)
    found = inputs(Part(("job/a.py",)), tmp_path)
    assert [path.name for path in found] == ["a.py", "b.py", "c.py"]
    with pytest.raises(FileNotFoundError, match=r"job/gone\.py"):
        inputs(Part((), ("job/gone.py",)), tmp_path)


def test_versions_of_packages_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = set()
    monkeypatch.syspath_prepend(tmp_path)
    for version in ("1.0", "1.1"):
        about = tmp_path / "kitchen-1.dist-info"
        about.mkdir(exist_ok=True)
        (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: kitchen\nVersion: {version}\n")
        found.add(digest(Part((), (), ("kitchen",)), tmp_path))
    assert len(found) == 2
    shutil.rmtree(tmp_path / "kitchen-1.dist-info")
    importlib.invalidate_caches()
    assert digest(Part((), (), ("kitchen",)), tmp_path) not in found


@pytest.mark.parametrize("content", [None, "", "{", "[1]", '{"image": 3}', '{"image": "other"}'])
def test_where_the_record_does_not_tell_the_parts_run(content: str | None, tmp_path: Path) -> None:
    file = tmp_path / "full_lane.json"
    if content is not None:
        file.write_text(content)
    assert changed({"image": "now", "kills": "now"}, lanes.recorded(file)) == ["image", "kills"]
    file.write_text(json.dumps({"image": "now"}))
    assert changed({"image": "now", "kills": "now"}, lanes.recorded(file)) == ["kills"]


@given(
    parts=st.sets(st.sampled_from(sorted(PARTS))),
    sizes=st.dictionaries(st.sampled_from([*PARTS, ""]), st.integers(0, 6)),
    seed=st.integers(0, 10**6),
)
def test_changed_parts_run_whole_and_others_by_sample(parts: set[str], sizes: dict[str, int], seed: int) -> None:
    tests = {f"{part}{number}": part for part, size in sizes.items() for number in range(size)}
    found = chosen(tests, parts, seed)
    assert found == chosen(dict(reversed(tests.items())), parts, seed)  # every worker has to choose the same
    for part, size in sizes.items():
        count = sum(tests[test] == part for test in found)
        assert count == (size if part in parts or not part else min(size, lanes.SAMPLE))


def test_in_time_every_test_of_a_part_is_in_a_sample() -> None:
    tests = {str(number): "kills" for number in range(10)}
    assert set().union(*(chosen(tests, (), seed) for seed in range(100))) == set(tests)


@given(st.lists(st.tuples(st.sampled_from([*PARTS, "test", ""]), st.booleans())))
def test_a_part_has_passed_when_all_its_tests_have(results: list[tuple[str, bool]]) -> None:
    found = passed([Outcome(lane, fine, 1.0) for lane, fine in results])
    assert found <= PARTS.keys()
    for part in PARTS:
        own = [fine for lane, fine in results if lane == part]
        assert (part in found) == (bool(own) and all(own) and all(lane for lane, _ in results))


def test_longest_first_unknown_ones_between_and_short_ones_as_they_are() -> None:
    durations = {"a.py": {"long": 40.0, "longer": 50.0, "middling": 4.0}, "b.py": {"g1": 30.0, "g2": 30.0}}
    tests = [
        *(Placed(f"a.py::{name}") for name in ("short", "long", "shorter", "middling", "longer")),
        *(Placed(f"b.py::{name}", "group") for name in ("g1", "g0", "g2")),
        Placed("b.py::new and slow", slow=True),
        Placed("new.py::anything"),
        Placed("b.py::new"),
    ]
    names = [tests[index].node.partition("::")[2] for index in ordered(tests, durations)]
    groups, singles = ["g1", "g0", "g2"], ["longer", "long"]
    expected = [*groups, *singles, "new and slow", "anything", "middling", "short", "shorter", "new"]
    assert names == expected


def test_durations_are_renewed_by_tests_that_passed() -> None:
    before = {"tests/integration/test_lanes.py": {"a": 3.0, "b": 3.0, "c": 9.0}, "tests/test_gone.py": {"a": 1.0}}
    now = {
        "tests/integration/test_lanes.py::a": Outcome("test", True, 5.04),
        "tests/integration/test_lanes.py::b": Outcome("test", True, 0.2),
        "tests/integration/test_lanes.py::c": Outcome("test", False, 900.0),
        "tests/unit/test_docs.py::d": Outcome("test", True, 0.1),
    }
    assert lanes.merged_durations(before, now) == {
        "tests/unit/test_docs.py": {},
        "tests/integration/test_lanes.py": {"a": 5.0, "c": 9.0},
    }
    assert lanes.plain_node("t.py::test_x[a@b]") == "t.py::test_x[a@b]"
    assert lanes.plain_node("t.py::test_x[a@b]@other-s3") == "t.py::test_x[a@b]"


TESTS = """
import pytest

@pytest.mark.full("families")
@pytest.mark.parametrize("number", range(3))
def test_that_passes(number): pass

@pytest.mark.full("families")
def test_that_passes_in_company(): pass

@pytest.mark.full("organisms")
@pytest.mark.parametrize("number", range(2))
def test_that_fails_at_times(number): assert number

@pytest.mark.full("checkpoints")
def test_that_is_skipped(): pytest.skip("for want of a kitchen")

@pytest.mark.full("kills")
def test_that_passes_alone(): pass

@pytest.mark.full
def test_of_no_part(): pass

def test_of_the_other_lane(): pass
"""
SETTINGS = "[pytest]\nmarkers =\n    full\n    slow\n    xdist_group\n"


@pytest.fixture
def kitchen(tmp_path: Path) -> Path:
    (tmp_path / "test_kitchen.py").write_text(TESTS)
    (tmp_path / "pytest.ini").write_text(SETTINGS)
    return tmp_path


def run_pytest(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-p", "xdist.plugin", "-p", "tests.selection", *map(str, arguments)]
    own = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    env = {**own, "PYTHONPATH": str(ROOT), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}  # the others take a second to load
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=env)


def test_what_became_of_tests_is_collected_from_all_workers(kitchen: Path) -> None:
    told = run_pytest("-n", 2, "--dist", "loadgroup", "--no-loadscope-reorder", "--results", "found.json", cwd=kitchen)
    assert told.returncode == 1, told.stdout + told.stderr
    found = {node: Outcome(**one) for node, one in json.loads((kitchen / "found.json").read_text()).items()}
    assert len(found) == 10
    assert passed(found.values()) == {"families", "kills"}


def test_where_a_worker_has_died_no_part_has_passed(tmp_path: Path) -> None:
    results = Results(tmp_path / "found.json")
    for name, lane in (("one", "kills"), ("two", "kills")):
        for when in ("setup", "call", "teardown"):
            results.pytest_runtest_logreport(report(f"t.py::{name}", "passed", when, [("lane", lane)]))
    assert lanes_passed(results, tmp_path / "found.json") == {"kills"}
    # As pytest-xdist reports it before rerunning the test.
    results.pytest_runtest_logreport(report("t.py::three@group", "failed", "???", []))
    assert lanes_passed(results, tmp_path / "found.json") == set()
    for when in ("setup", "call", "teardown"):
        results.pytest_runtest_logreport(report("t.py::three@group", "passed", when, [("lane", "kills")]))
    assert lanes_passed(results, tmp_path / "found.json") == set()


def report(node: str, outcome: Any, when: Any, properties: list[tuple[str, object]]) -> pytest.TestReport:
    return pytest.TestReport(node, ("t.py", None, "t.py"), {}, outcome, None, when, user_properties=properties)


def lanes_passed(results: Results, file: Path) -> set[str]:
    results.pytest_sessionfinish()
    return passed([Outcome(**one) for one in json.loads(file.read_text()).values()])


def test_ci_selects_the_parts_that_changed_and_samples_the_others(kitchen: Path) -> None:
    told = run_pytest("-m", "full", "-v", "--full-parts", "organisms", "--sample-seed", 7, cwd=kitchen)
    ran = re.findall(r"::(test_\w+)\S* (?:PASSED|FAILED|SKIPPED)", told.stdout)
    assert {"test_that_is_skipped", "test_that_passes_alone", "test_of_no_part"} <= {*ran}
    assert ran.count("test_that_fails_at_times") == 2
    assert ran.count("test_that_passes") + ran.count("test_that_passes_in_company") == lanes.SAMPLE
    assert "test_of_the_other_lane" not in ran


def test_a_part_that_does_not_exist_is_refused(kitchen: Path) -> None:
    (kitchen / "test_kitchen.py").write_text(TESTS.replace('"kills"', '"kitchens"'))
    told = run_pytest("--collect-only", cwd=kitchen)
    assert told.returncode == 4
    assert "the full lane has no part 'kitchens'" in told.stderr + told.stdout
