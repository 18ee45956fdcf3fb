"""What the truth test remembers; that it finds every writer is shown in tests/integration/architectures."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from transformers import PreTrainedModel

from job.architectures.spec import Architecture
from job.proof import truth_test
from job.proof.truth_test import inspect_model


def test_a_model_is_proven_once_wherever_its_files_lie_and_anew_if_it_differs(
    random_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Architecture] = []
    real = truth_test.prove

    def counted(model: PreTrainedModel, architecture: Architecture) -> None:
        asked.append(architecture)
        real(model, architecture)

    monkeypatch.setattr(truth_test, "prove", counted)
    described = json.loads((random_model_folder / "config.json").read_text())
    # Unlike that of any other test.
    described["max_position_embeddings"] = 257
    for name in ("before", "after"):
        shutil.copytree(random_model_folder, tmp_path / name)
        (tmp_path / name / "config.json").write_text(json.dumps(described))
    first = inspect_model(tmp_path / "before")
    assert inspect_model(tmp_path / "after") == inspect_model(tmp_path / "before") == first
    assert len(asked) == 1
    (tmp_path / "after" / "config.json").write_text(json.dumps({**described, "num_hidden_layers": 2}))
    assert inspect_model(tmp_path / "after").layer_count == 2 != first.layer_count
    assert len(asked) == 2
