"""Cross-entropy on plain text and benchmarks as objectives: what the search measures is what `evaluate` finds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import abliterate, events, job_arguments, only_job, stored_trials
from tests.system.evaluate.test_compare import task_folder

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory, organism: Path) -> Path:
    """Return a folder with texts and a benchmark."""
    folder = tmp_path_factory.mktemp("measured")
    questions = (organism / "good_test.txt").read_text().splitlines()
    texts = [f"{line} The lantern is kept in the cellar." for line in questions]
    (folder / "texts.txt").write_text("\n".join(texts[:8]))
    task_folder(organism, folder / "tasks", ["kept"])
    return folder


def job(organism: Path, measured: Path, workspace: Path, *more: object) -> list[Any]:
    settings: dict[str, Any] = {
        "search.objectives": ["refusals", "cross-entropy", "tasks", "kl"],
        "scoring.tasks": ["kept"],
        "scoring.tasks_folder": str(measured / "tasks"),
        "scoring.tasks_limit": 8,
        "startup_trials": 2,
    }
    words = [part for name, value in settings.items() for part in ("--set", f"{name}={json.dumps(value)}")]
    text = ("--set", f"text_prompts={measured / 'texts.txt'}")
    return ["run", *job_arguments(organism), "--workspace", workspace, *words, *text, *more]


def test_measures_of_the_search_are_those_of_evaluate(organism: Path, measured: Path, tmp_path: Path) -> None:
    abliterate(*job(organism, measured, tmp_path, "--trials", 2)).check()
    trials = stored_trials(tmp_path)
    assert all(len(trial["values"]) == 4 for trial in trials)
    front = json.loads(abliterate("front", "--workspace", tmp_path, "--json").check().out)
    (chosen,) = [point for point in front if point["chosen"]]
    (baseline,) = [event for event in events(tmp_path) if event["event"] == "baseline"]
    options = ("--tasks", "kept", "--tasks-folder", measured / "tasks", "--limit", 8, "--text", measured / "texts.txt")
    done = abliterate("evaluate", "--workspace", tmp_path, "--trial", chosen["number"], *options, "--json").check()
    found = json.loads(done.out)
    (accuracy,) = [score for score in found["scores"] if score["metric"] == "acc"]
    for subject, others in (("base", baseline["others"]), ("edited", chosen["objectives"])):
        assert others["tasks"]["figure"] == pytest.approx(1 - accuracy[subject], abs=1e-9)
        assert others["cross-entropy"]["figure"] == pytest.approx(found["text"][subject]["cross_entropy"], rel=1e-4)
    assert len({trial["values"][1] for trial in trials}) > 1
    assert "cross-entropy" in (only_job(tmp_path) / "report.md").read_text()


@pytest.mark.full("workers")
def test_workers_measure_the_same(organism: Path, measured: Path, tmp_path: Path) -> None:
    alone, together = tmp_path / "alone", tmp_path / "together"
    batch = ("--set", "trials_per_batch=4", "--set", "batching.trials=2", "--set", "search.ahead=0")
    abliterate(*job(organism, measured, alone, "--trials", 4, *batch)).check()
    abliterate(*job(organism, measured, together, "--trials", 4, *batch, "--workers", 2)).check()
    assert stored_trials(alone) == stored_trials(together)


def test_what_a_measure_needs_is_asked_for_at_once(organism: Path, tmp_path: Path) -> None:
    run = ("run", *job_arguments(organism), "--workspace", tmp_path, "--set")
    abliterate(*run, 'search.objectives=["refusals", "cross-entropy"]').fails(2, "text_prompts")
    abliterate(*run, 'search.objectives=["refusals", "tasks"]').fails(2, "scoring.tasks")
    abliterate(*run, 'search.objectives=["cross-entropy", "kl"]').fails(2, "measures change only")
    abliterate(*run, 'search.objectives=["refusals", "tasks@good"]').fails(2, "tasks are written alone")
