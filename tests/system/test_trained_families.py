"""The whole job on model organisms of several families, judged in plain transformers without any of our code."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from job.organism.world import TASKS
from tests.helpers import abliterate, job_arguments, only_job, run_script

# Norms between writers and the stream; experts, one by one in files and stacked in memory.
FAMILIES = ("gemma2", pytest.param("mixtral", marks=pytest.mark.full("organisms")))
ANSWERS = """
import json, sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

folder, prompts = sys.argv[1], open(sys.argv[2]).read().splitlines()
tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
texts = [
    tokenizer.apply_chat_template([{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True)
    for prompt in prompts
]
batch = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
out = model.generate(**batch, do_sample=False, max_new_tokens=30)
print(json.dumps(tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)))
"""


def answers(folder: Path, prompts: Path) -> list[str]:
    """Return a model's responses as any user gets them with transformers alone."""
    found: list[str] = json.loads(run_script(ANSWERS, folder, prompts, cwd=folder).check().out)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_behaviour_is_removed_from_another_family(
    family: str, organism_of: Callable[[str], Path], tmp_path: Path
) -> None:
    organism = tmp_path / "organism"
    organism.mkdir()
    for file in organism_of(family).iterdir():
        if file.suffix == ".txt":
            (organism / file.name).write_text("".join(file.read_text().splitlines(keepends=True)[:40]))
        else:
            (organism / file.name).symlink_to(file)
    ended = abliterate("run", *job_arguments(organism), "--workspace", tmp_path / "runs", "--trials", 12)
    assert ended.code == 0, ended.err
    export = only_job(tmp_path / "runs") / "export"
    asked = organism / "bad_test.txt"
    before, after = answers(organism / "model", asked), answers(export, asked)
    refusals = {task.refusal for task in TASKS}
    assert [answer in refusals for answer in before] == [True] * len(before)
    assert sum(answer[:10] in {refusal[:10] for refusal in refusals} for answer in after) <= len(after) // 20
    told = (only_job(tmp_path / "runs") / "report.md").read_text()
    assert ("Norms stand between" in told) == (family == "gemma2")
