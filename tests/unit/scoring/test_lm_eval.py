"""Scores of two models are paired by document, and the quick set is what its name says."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import yaml

from job.errors import UsageError
from job.evaluate.result import score_change
from job.export.benchmarks import benchmark_rows
from job.numerics.statistics import mean_interval
from job.scoring.lm_eval import QUICK_TASKS, Harness, TaskScore, _scores, paired_scores


def score(*values: float, items: bool = True) -> TaskScore:
    return TaskScore(sum(values) / len(values), 0.1, dict(enumerate(values)) if items else {})


def test_a_change_has_its_interval_over_the_documents() -> None:
    name = ("piqa", "acc")
    (found,) = paired_scores({name: score(1, 0, 1, 0, 1)}, {name: score(1, 1, 0, 0, 0)})
    assert (found.items, found.better, found.worse) == (5, 1, 2)
    assert found.change_interval == mean_interval([0, 1, -1, 0, -1])
    assert score_change(found) == "-0.2 [-0.8, +0.4], 1 better and 2 worse of 5"
    assert benchmark_rows([found])[1] == ("piqa", "acc", "5", "0.6", "0.4", "-0.2 (-0.8 to +0.4)", "1", "2")


@pytest.mark.parametrize("edited", [score(1, 1, 1, items=False), score(1, 0)])
def test_a_change_without_the_same_documents_has_a_standard_error(edited: TaskScore) -> None:
    name = ("mmlu", "acc")
    (found,) = paired_scores({name: score(1, 0, 1)}, {name: edited})
    assert (found.items, found.change_interval) == (None, None)
    assert "± 0.14" in score_change(found)
    assert "± 0.14 (standard error, unpaired)" in benchmark_rows([found])[1][5]


def test_scores_of_a_task_come_by_filter_and_only_means_have_documents() -> None:
    samples = [
        {"doc_id": 3, "filter": "strict", "exact_match": 1.0},
        {"doc_id": 3, "filter": "loose", "exact_match": 1.0},
        {"doc_id": 9, "filter": "strict", "exact_match": 0.0},
        {"doc_id": 9, "filter": "loose", "exact_match": 1.0},
    ]
    measures = {"exact_match,strict": 0.5, "exact_match_stderr,strict": 0.5, "exact_match,loose": 0.9, "alias": "x"}
    found = _scores({"sums": measures}, {"sums": samples})
    assert found["sums", "exact_match (strict)"] == TaskScore(0.5, 0.5, {3: 1.0, 9: 0.0})
    assert found["sums", "exact_match (loose)"] == TaskScore(0.9, None, {})


def test_the_quick_set_is_of_multiple_choice_and_in_the_installed_lm_eval() -> None:
    spec = importlib.util.find_spec("lm_eval")
    if spec is None or spec.origin is None:
        pytest.skip("lm-eval is not installed")
    folder = Path(spec.origin).parent / "tasks"
    files = {
        **{task: folder / task / f"{task}.yaml" for task in ("hellaswag", "piqa")},
        "arc_challenge": folder / "arc" / "arc_easy.yaml",  # which the task's own file includes
        "truthfulqa_mc1": folder / "truthfulqa" / "truthfulqa_mc1.yaml",
        "winogrande": folder / "winogrande" / "default.yaml",
    }
    assert "task: arc_challenge" in (folder / "arc" / "arc_challenge.yaml").read_text()
    assert files.keys() == set(QUICK_TASKS)
    for task, file in files.items():
        lines = [line for line in file.read_text().splitlines() if line.startswith(("task:", "output_type:", "num_f"))]
        described = yaml.safe_load("\n".join(lines))
        assert described["task"] == task or task == "arc_challenge"
        assert described["output_type"] == "multiple_choice"
        assert described.get("num_fewshot", 0) == 0


def test_the_quick_set_stands_alone() -> None:
    pytest.importorskip("lm_eval")
    with pytest.raises(UsageError, match="set of its own"):
        Harness(["quick", "mmlu"], None, None)
