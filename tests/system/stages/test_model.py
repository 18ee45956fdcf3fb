"""A job goes on by the rules that it began with, also where later versions have others."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from job.storage.exports import REPRODUCE
from tests.helpers import abliterate, job_arguments, only_job, stored_trials

RULES = {"pull_back": "dual", "topic_words": True, "evasions": True}


def run(organism: Path, workspace: Path, *options: object) -> Path:
    # Few prompts: this is not about figures.
    files = {"good": "good_train", "bad": "bad_train", "good-eval": "good_test", "bad-eval": "bad_test"}
    few = [f"--{kind}-prompts={organism / file}.txt#train[:20]" for kind, file in files.items()]
    abliterate("run", *job_arguments(organism), *few, "--workspace", workspace, "--trials", 3, *options).check()
    return only_job(workspace)


def exported(job: Path) -> bytes:
    return (job / "export" / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_a_job_of_a_former_version_goes_on_by_its_own_rules(organism_of: Callable[[str], Path], tmp_path: Path) -> None:
    organism = organism_of("gemma2")
    given, new = (
        run(organism, tmp_path / "given", "--set", "ablation.pull_back=gain"),
        run(organism, tmp_path / "new"),
    )
    record = json.loads((new / "job.json").read_text())
    assert "pull_back" not in record["identity"]["ablation"]
    assert {name: record["resolution"].pop(name) for name in RULES} == RULES
    # The job as a former version began it: the same identity, without these rules.
    old = tmp_path / "old" / new.name
    old.mkdir(parents=True)
    (old / "job.json").write_text(json.dumps(record))
    assert run(organism, tmp_path / "old") == old
    assert not RULES.keys() & json.loads((old / "job.json").read_text())["resolution"].keys()
    assert stored_trials(tmp_path / "old") == stored_trials(tmp_path / "given")
    assert stored_trials(tmp_path / "old") != stored_trials(tmp_path / "new")
    assert exported(old) == exported(given) != exported(new)

    for job in (old, new):
        made = json.loads((job / "export" / REPRODUCE).read_text())["resolution"]
        assert RULES.items() <= made.items() if job == new else not RULES.keys() & made.keys()
        # From its reproduce.json, and from its file of directions.
        workspace = job.parent
        again = run(organism, workspace / "again", "--reproduce", job / "export" / REPRODUCE)
        assert exported(again) == exported(job)
        folder = abliterate("export", "--workspace", workspace, "--format", "directions").check().out.strip()
        abliterate("apply", organism / "model", folder, workspace / "applied").check()
        assert (workspace / "applied" / "model.safetensors").read_bytes() == exported(job)
