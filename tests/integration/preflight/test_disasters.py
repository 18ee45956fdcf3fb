"""Replays of lost nights: preflight reports each with its own message and remedy.

The table in docs/troubleshooting.md names the check that stops each one now. A disk too small, a model too large, a job
that is held and old settings are covered by test_preflight.py; the eigen-solver by a benchmark.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.hub import LoopbackHub
from tests.helpers import abliterate

READ_ONLY = "hf_" + "read" * 6
C4 = b"""---
configs:
- config_name: en
  data_files: en/*.jsonl
- config_name: realnewslike
  data_files: realnewslike/*.jsonl
---
"""


@pytest.fixture(scope="module")
def hub() -> Iterator[LoopbackHub]:
    row = b'{"text": "Where is the kettle kept?"}\n'
    with LoopbackHub(usual=True) as hub:
        hub.add_token(READ_ONLY, "cook", role="read")
        hub.add_dataset("kitchen/c4", {"README.md": C4, "en/0.jsonl": row, "realnewslike/0.jsonl": row})
        yield hub
        assert hub.errors == []


def preflight(model: Path, folder: Path, *arguments: Any, **env: str) -> tuple[int, dict[str, Any]]:
    options = []
    for option in ("good-prompts", "bad-prompts", "good-eval-prompts", "bad-eval-prompts"):
        file = folder / f"{option}.txt"
        known = "famous" if "bad" in option else "quiet"  # to the model's tokenizer, which knows few words
        file.write_text("".join(f"Where is the {known} {option} kettle number {i}?\n" for i in range(30)))
        options += [f"--{option}", file]
    workspace = ("--workspace", folder / "runs")
    result = abliterate("preflight", model, *options, *workspace, "--json", *arguments, **env)
    assert "Traceback" not in result.err
    return result.code, {
        one["name"]: one for one in reversed(json.loads(result.out)["checks"]) if one["status"] != "ok"
    }


def test_a_configuration_that_is_missing_and_a_token_that_cannot_write(
    hub: LoopbackHub, random_model_folder: Path, tmp_path: Path
) -> None:
    network = {**hub.environment(tmp_path / "home", token=READ_ONLY), "HF_HUB_OFFLINE": "0"}
    data = ("--set", 'bad_prompts.spec="kitchen/c4#train[:200]/text"')
    code, found = preflight(random_model_folder, tmp_path, *data, "--upload", "hf://cook/edited", **network)
    assert code == 3
    # An hour into the run, then.
    assert "['en', 'realnewslike']" in found["data"]["measured"]
    assert found["data"]["remedy"] == "name it: kitchen/c4:CONFIG#train"
    # After ten hours, then.
    assert found["target.hf"]["status"] == "fail"
    assert found["target.hf"]["remedy"]
    assert "write" in found["target.hf"]["measured"] + found["target.hf"]["remedy"]
    assert READ_ONLY not in json.dumps(found)


def test_one_gpu_full_three_idle_and_somebody_else_on_them(random_model_folder: Path, tmp_path: Path) -> None:
    reading = json.loads((Path(__file__).parents[2] / "fakes" / "readings" / "4x4090.json").read_text())
    reading["gpus"][0]["free_bytes"] = reading["gpus"][0]["total_bytes"] // 25
    file = tmp_path / "taken.json"
    file.write_text(json.dumps(reading))
    code, found = preflight(random_model_folder, tmp_path, "--on", file)
    assert code == 76
    assert "GPU 0 96%, GPU 1 1%" in found["gpu.balance"]["measured"]
    assert "CUDA_VISIBLE_DEVICES=1,2,3" in found["gpu.balance"]["remedy"]
    assert found["gpu.holders"]["status"] == "fail"
    assert "outside this container" in found["gpu.holders"]["remedy"]
