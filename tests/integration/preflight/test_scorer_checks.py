"""Scorers are tried before a job: a judge with one question, a classifier by its labels, a package by its import."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForSequenceClassification

from job.errors import ImpossibleJobError
from job.scoring.classifier import TextClassifier
from tests.fakes.judge import Endpoint
from tests.helpers import abliterate, job_arguments, loading


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    with Endpoint() as server:
        yield server


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("classifier")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    labels = {0: "POLITE", 1: "RUDE", 2: "ODD"}
    BertForSequenceClassification(BertConfig(vocab_size=8, **sizes, id2label=labels)).save_pretrained(folder)
    return folder


def given(**settings: Any) -> list[str]:
    return [word for name, value in settings.items() for word in ("--set", f"{name}={json.dumps(value)}")]


def checks(organism: Path, workspace: Path, *more: str) -> dict[str, dict[str, str]]:
    """Return preflight's checks of scorers by name; the job may have failed."""
    done = abliterate("preflight", *job_arguments(organism), "--workspace", workspace, *more, "--json")
    found = {check["name"]: check for check in json.loads(done.out)["checks"]}
    return {name: check for name, check in found.items() if name.startswith("scorer")}


def test_a_judge_is_asked_one_harmless_question_before_the_job(
    organism: Path, endpoint: Endpoint, tmp_path: Path
) -> None:
    asked = given(**{"search.objectives": ["judge", "kl"], "judge.url": endpoint.url, "judge.model": "tiny"})
    found = checks(organism, tmp_path, *asked)
    assert found["scorer.judge"]["status"] == "ok"
    (body,) = endpoint.asked
    assert "capital of France" in body["messages"][0]["content"]
    endpoint.failures = [(401, ""), (404, json.dumps({"error": {"message": "no model tiny"}}))]
    run = ("run", *job_arguments(organism), "--workspace", tmp_path, *asked)
    abliterate(*run).fails(2, "refuses the key", "JUDGE_API_KEY")
    abliterate(*run).fails(2, "no model tiny", "judge.model")
    endpoint.reply = "I would rather not."
    endpoint.failures = []
    abliterate(*run, "--trials", 1).fails(2, "without a number")
    assert not list(tmp_path.glob("*/study.db"))


def test_a_judge_that_only_the_report_uses_does_not_stop_the_job(
    organism: Path, endpoint: Endpoint, tmp_path: Path
) -> None:
    endpoint.failures = [(403, "")]
    asked = given(**{"scoring.detectors": ["judge"], "judge.url": endpoint.url, "judge.model": "tiny"})
    (check,) = checks(organism, tmp_path, *asked).values()
    assert check["status"] == "warn"
    assert "the report will lack the detector judge" in check["measured"]


def test_a_classifier_is_known_by_its_labels_before_it_is_loaded(
    organism: Path, classifier: Path, tmp_path: Path
) -> None:
    def of(model: Path, scorer: str = "classifier", *labels: str) -> dict[str, str]:
        setting = "scoring.nli_model" if scorer == "nli" else "scoring.classifier"
        asked = given(
            **{"search.objectives": [scorer, "kl"], setting: str(model), "scoring.classifier_labels": list(labels)}
        )
        (check,) = checks(organism, tmp_path, *asked).values()
        assert check["name"] == f"scorer.{scorer}"
        return check

    assert of(classifier, "classifier", "rude")["status"] == "ok"
    for check, part in (
        (of(classifier), "none is chosen"),
        (of(classifier, "classifier", "angry"), "none is angry"),
        (of(classifier, "nli"), "none is entailment"),
        (of(organism / "model", "classifier", "rude"), "config.json names LlamaForCausalLM"),
    ):
        assert check["status"] == "fail"
        assert part in check["measured"]


def test_a_classifier_whose_files_lack_the_classifying_layer_is_refused(
    organism: Path, classifier: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "headless"
    shutil.copytree(classifier, folder)
    for file in (organism / "model").glob("tokenizer*"):
        shutil.copy(file, folder)
    TextClassifier.loaded(str(folder), "scoring.classifier", loading("auto"), print)
    weights = load_file(folder / "model.safetensors")
    save_file(
        {name: tensor for name, tensor in weights.items() if not name.startswith("classifier.")},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    with pytest.raises(ImpossibleJobError, match=r"lack classifier\.bias, which would be random"):
        TextClassifier.loaded(str(folder), "scoring.classifier", loading("auto"), print)
