"""The benchmark of a GPU, whole, on a CPU and a tiny shape; and what it does with parts that hang or die."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu
from tests.helpers import environment

ROOT = Path(__file__).parents[2]


def figures(file: Path, *options: str, code: int = 0) -> dict[tuple[str, str], dict[str, Any]]:
    """Run the benchmark on a CPU; return its results by subject and part."""
    words = [
        sys.executable,
        "-m",
        "benchmarks.gpu",
        "--device",
        "cpu",
        "--shape",
        "tiny",
        "--json",
        str(file),
        *options,
    ]
    done = subprocess.run(words, cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == code, done.stdout + done.stderr
    found = json.loads(file.read_text())["results"]
    assert all(f"{one['subject']:>9} {one['part']:>10}" in done.stdout for one in found)
    return {(one["subject"], one["part"]): one for one in found}


@pytest.mark.full("organisms")
@pytest.mark.slow
def test_all_parts_on_a_cpu_and_a_tiny_shape(tmp_path: Path) -> None:
    found = figures(tmp_path / "gpu.json", "--minutes", "60")
    assert list(found) == [(plan.subject, name) for plan in gpu.plans("tiny") for name in plan.limits]
    for key, one in found.items():
        assert not {"error", "left_out"} & set(one), (key, one)
        assert not one.get("wrong"), (key, one)
    assert found["tiny", "ceilings"]["ceilings"]["flops"] > 1e6
    for subject in ("organism", "tiny"):
        assert set(found[subject, "padding"]["dtypes"]) == {"float32", "bfloat16", "float16"}
        for one in found[subject, "padding"]["dtypes"].values():
            assert (one["padded"], one["finite"], one["said"]) == (True, True, [])
        # An edit moves logits much further than its hooks are from its weights.
        for one in found[subject, "hooks"]["dtypes"].values():
            assert one["none"]["edit"] > 5 * one["none"]["hooks_weights"]
    trial = found["tiny", "trials"]
    assert sum(trial["parts_s"].values()) == pytest.approx(trial["trial_s"], rel=0.01)
    assert trial["repeatable"]
    assert trial["memory"]["planned"]["weights"] > 0
    assert found["tiny", "solver"]["least_cosine"] > 0.999
    assert found["job", "resume"]["killed_after"] == 4
    assert "match" in found["job", "job"]["proof"]


CHILD = """
import json, os, sys, time
for part in sys.argv[3:]:
    if part == "hangs":
        time.sleep(60)
    if part == "dies":
        os._exit(9)
    print(json.dumps({"summary": part, "process": os.getpid()}), flush=True)
"""


def test_a_part_that_hangs_or_dies_does_not_take_the_others_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "__init__.py").touch()
    (tmp_path / "benchmarks" / "gpu_parts.py").write_text(CHILD)
    monkeypatch.setattr(gpu, "ROOT", tmp_path)  # where its children start
    monkeypatch.delenv("PYTHONPATH", raising=False)
    limits = dict.fromkeys(("first", "hangs", "second", "dies", "third"), 20.0) | {"hangs": 1.0}
    begun = time.monotonic()
    found = list(gpu.results(gpu.Plan("subject", limits), "cpu", begun + 40))
    assert time.monotonic() - begun < 20
    assert [one["part"] for one in found] == list(limits)
    assert [gpu.said(one) for one in found] == [
        "first",
        "stopped after 1 s",
        "second",
        "its process ended with exit code 9",
        "third",
    ]
    processes = {one["process"] for one in found if "process" in one}
    assert len(processes) == 3
    late = list(gpu.results(gpu.Plan("subject", limits), "cpu", time.monotonic() + 1))
    assert {one["left_out"] for one in late} == {"no time is left"}
