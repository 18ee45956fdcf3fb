"""The token that docs/costs.md recommends for untrusted machines: enough for a whole job, and for nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.fakes.hub import LoopbackHub
from tests.helpers import abliterate, job_arguments

TOKEN = "hf_WritesToTwoRepositoriesOnly0001"
MODEL, STATE, RESULT, DIARY = "kitchen/organism", "cook/state", "cook/edited", "cook/diary"


@pytest.mark.slow
def test_write_access_to_two_repositories_made_beforehand_is_enough_for_a_whole_job(
    organism: Path, tmp_path: Path
) -> None:
    weights = organism / "model"
    with LoopbackHub(usual=True) as hub:
        hub.add_model(MODEL, weights, gated="manual")
        for name in (STATE, RESULT, DIARY):
            hub.add_model(name, {"README.md": b"Made beforehand."}, private=True)
        diary = hub.repo("model", DIARY).sha
        rights = {STATE: "write", RESULT: "write", MODEL: "read"}
        hub.add_token(TOKEN, "cook", role="fine-grained", namespaces=rights, gated=[MODEL])
        env = {**hub.environment(tmp_path / "home", TOKEN), "HF_HUB_OFFLINE": "0"}
        job: list[Any] = ["run", MODEL, *job_arguments(organism)[1:], "--trials", 1, "--set", "startup_trials=1"]
        job += ["--checkpoint", f"hf://{STATE}", "--upload", f"hf://{RESULT}"]
        done = abliterate(*job, "--workspace", tmp_path / "first", **env).check()
        assert "model.safetensors" in hub.repo("model", RESULT).at("main").files
        assert "finished" in abliterate("status", "--checkpoint", f"hf://{STATE}", **env).check().out
        again = abliterate(*job, "--workspace", tmp_path / "second", **env).check()
        assert "nothing to do" in again.err
        # No other repository was changed or made, and the token opens only these two.
        assert hub.repo("model", DIARY).sha == diary
        assert {repo.id for repo in hub.repos()} == {MODEL, STATE, RESULT, DIARY}
        assert TOKEN not in done.err + again.err
        other = [*job[:-1], f"hf://{DIARY}"]
        abliterate(*other, "--workspace", tmp_path / "third", "--new", **env).fails(3, DIARY)
        assert hub.errors == []
