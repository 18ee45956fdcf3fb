"""A model folder with one file changed at random: refused in one line that names it, or the whole job succeeds."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.cases import BRIEF, shorten
from tests.cases.models import sharded
from tests.helpers import Result, abliterate, job_arguments, stored_trials
from tests.mutations import Mutation, mutate

SEED = "2026-12-01"
COUNT, CHUNK, SAMPLED = 500, 50, 16


@dataclass(frozen=True)
class Verdict:
    """What became of a mutant.

    Attributes:
        number: Which one it is.
        mutation: What was changed.
        checked: How preflight ended.
        said: The lines of failed checks.
        ran: How the run ended, None where preflight refuses it.
        fault: What is wrong with that, None for nothing.
    """

    number: int
    mutation: Mutation
    checked: Result
    said: tuple[str, ...]
    ran: Result | None = None
    fault: str | None = None

    def __str__(self) -> str:
        end = "" if self.ran is None else f", run {self.ran.code}: {self.ran.err[-600:]}"
        said = " | ".join(self.said) or self.checked.err[-1500:]
        return f"{self.number} {self.mutation.file} {self.mutation.name}: {self.fault}; {self.checked.code} {said}{end}"


@pytest.fixture(scope="session")
def bases(organism: Path, shared: Callable[[str, Callable[[Path], None]], Path]) -> Path:
    """Return a folder with two valid models, of one file and of two, and short files of prompts."""

    def build(folder: Path) -> None:
        folder.mkdir()
        for file in organism.glob("*.txt"):
            (folder / file.name).write_text("".join(file.read_text().splitlines(keepends=True)[:4]))
        model = folder / "single"
        shutil.copytree(organism / "model", model)
        shorten(model)
        # As earlier versions of transformers write them.
        special = {"eos_token": "<|end|>", "pad_token": {"content": "<pad>", "lstrip": False}, "unk_token": "<unk>"}
        (model / "special_tokens_map.json").write_text(json.dumps(special, indent=1))
        (model / "added_tokens.json").write_text(json.dumps({"<|user|>": 4, "<|assistant|>": 5}, indent=1))
        shutil.copytree(model, folder / "sharded")
        sharded(folder / "sharded")

    return shared("fuzz", build)


def arguments(bases: Path, model: Path, workspace: Path) -> list[Any]:
    return [model, *job_arguments(bases)[1:], "--workspace", workspace, "--trials", 2, *BRIEF]


@pytest.fixture(scope="session")
def usual(bases: Path, shared: Callable[[str, Callable[[Path], None]], Path]) -> Path:
    """Return a workspace with the job on the valid model."""

    def build(workspace: Path) -> None:
        abliterate("run", *arguments(bases, bases / "single", workspace)).check()

    return shared("fuzz-usual", build)


def judged(number: int, bases: Path, usual: Path, folder: Path) -> Verdict:
    """Return what becomes of a mutant, made and tried in a new folder."""
    rng = random.Random(f"{SEED} {number}")
    model = folder / "model"
    shutil.copytree(bases / rng.choice(("single", "sharded")), model)
    mutation = mutate(model, rng)
    words = arguments(bases, model, folder / "runs")
    checked = abliterate("preflight", *words, "--json")
    try:
        checks = json.loads(checked.out)["checks"]
    except ValueError:
        return Verdict(number, mutation, checked, (), fault="preflight prints no checks")
    said = tuple(f"{one['measured']}; {one['remedy']}" for one in checks if one["status"] == "fail")
    found = Verdict(number, mutation, checked, said)
    if checked.code == 0:
        if any(one["status"] == "warn" and "the same tokens" in one["measured"] for one in checks):
            return found  # no direction can be found, and preflight says so
        ran = abliterate("run", *words)
        return Verdict(number, mutation, checked, said, ran, fault_of_run(mutation, ran, usual, folder / "runs"))
    return Verdict(number, mutation, checked, said, fault=fault_of_refusal(mutation, found))


def fault_of_refusal(mutation: Mutation, found: Verdict) -> str | None:
    if found.checked.code != 3:
        return f"exit code {found.checked.code}"
    if mutation.harmless:
        return "refused, although it means the same"
    if "Traceback" in found.checked.err:
        return "a traceback"
    if any("\n" in line for line in found.said):
        return "several lines"
    if not any(mutation.file in line for line in found.said):
        return "the file is not named"
    return None


def fault_of_run(mutation: Mutation, ran: Result, usual: Path, workspace: Path) -> str | None:
    if "Traceback" in ran.err:
        return "a traceback of the run"
    if mutation.values and ran.code == 3 and "does not generate in any of the dtypes" in ran.err:
        return None  # numbers of such a size that only a forward shows it
    if mutation.file == "chat_template.jinja" and ran.code == 3 and "refuses none of the bad" in ran.err:
        return None  # other prompts, to which only a forward shows the responses
    if ran.code != 0:
        return f"green, and the run ends with exit code {ran.code}"
    if mutation.harmless and stored_trials(workspace) != stored_trials(usual):
        return f"it means the same and gives another result: {stored_trials(workspace)} for {stored_trials(usual)}"
    return None


def faults(numbers: list[int], bases: Path, usual: Path, folder: Path) -> list[str]:
    """Return what is wrong with the verdicts on mutants; all of them go to the file that FUZZ_LOG names."""
    found = []
    for number in numbers:
        verdict = judged(number, bases, usual, folder / str(number))
        shutil.rmtree(folder / str(number))
        if (log := os.environ.get("FUZZ_LOG")) is not None:
            with open(log, "a", encoding="utf-8", errors="replace") as stream:
                stream.write(" ⏎ ".join(str(verdict).splitlines()) + "\n")
        if verdict.fault is not None:
            found.append(str(verdict))
    return found


@pytest.mark.parametrize("part", [0, pytest.param(1, marks=pytest.mark.full("fuzz"))])
def test_a_sample_of_changed_files(part: int, bases: Path, usual: Path, tmp_path: Path) -> None:
    numbers = random.Random(SEED).sample(range(COUNT), SAMPLED)
    assert faults(numbers[part::2], bases, usual, tmp_path) == []


@pytest.mark.full("fuzz")
@pytest.mark.slow
@pytest.mark.parametrize("start", range(0, COUNT, CHUNK))
def test_changed_files(start: int, bases: Path, usual: Path, tmp_path: Path) -> None:
    assert faults(list(range(start, start + CHUNK)), bases, usual, tmp_path) == []
