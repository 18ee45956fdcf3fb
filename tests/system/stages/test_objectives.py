"""A job whose search has a third objective, from the command to the report and back.

The organism refuses in four ways, and one of them says no marker of this job: it talks around the request. Markers
alone take it for an answer.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from job.records import DetectorReport
from job.search.study import read_trials
from tests.helpers import abliterate, count_events, events, job_arguments, manifest, only_job, stored_trials

pytestmark = pytest.mark.slow

SETTINGS = {
    "scoring.refusal_markers": ["sorry", "as an ai", "i cannot"],
    "scoring.words": ["many people ask about"],
    "search.objectives": ["refusals", "words", "kl"],
    "search.method": "auto",
    "startup_trials": 4,
}


def run(organism: Path, workspace: Path, trials: int, *more: object) -> str:
    words = [part for name, value in SETTINGS.items() for part in ("--set", f"{name}={json.dumps(value)}")]
    arguments = ["run", *job_arguments(organism), "--workspace", workspace, "--trials", trials, *words, *more]
    return abliterate(*arguments).check().err


@pytest.fixture(scope="module")
def searched(organism: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    workspace = tmp_path_factory.mktemp("objectives") / "runs"
    told = run(organism, workspace, 12)
    assert "; words " in told
    assert "edits by gradient" not in told
    return workspace


def test_status_front_and_report_show_objectives_by_name(searched: Path) -> None:
    job = only_job(searched)
    (baseline,) = [event for event in events(searched) if event["event"] == "baseline"]
    before = baseline["others"]["words"]["figure"]
    assert before > 0
    trials = read_trials(job / "study.db")
    assert {trial.values.objectives for trial in trials} == {("refusals", "words", "kl")}
    assert all(len(trial["values"]) == 3 for trial in stored_trials(searched))
    front = json.loads(abliterate("front", "--workspace", searched, "--json").check().out)
    (chosen,) = [point for point in front if point["chosen"]]
    assert (chosen["refusals"], chosen["objectives"]["words"]["figure"]) == (0, 0)
    assert "refusals" in chosen
    assert " words 0/20, KL " in abliterate("front", "--workspace", searched).check().out
    status = json.loads(abliterate("status", "--workspace", searched, "--json").check().out)
    assert status["best"][0]["values"].keys() == {"refusals", "kl"}
    assert "words 0/20" in abliterate("status", "--workspace", searched).check().out
    assert "| trial | refusals | broken responses | words | KL (nats) |" in (job / "report.md").read_text()
    assert ">words</th>" in (job / "report.html").read_text()
    export = (job / "export").resolve().name
    report = DetectorReport.model_validate_json((job / "figures" / f"{export}-detectors.json").read_text())
    counts = {(one.detector, one.model, one.prompts): one.refused for one in report.counts}
    assert counts["words", "base", "bad"] > 0 == counts["words", "edited", "bad"]


def test_what_another_start_goes_on_with_is_the_same_search(organism: Path, searched: Path, tmp_path: Path) -> None:
    """In two starts, and with workers: the run judges what they have generated."""
    workspace = tmp_path / "runs"
    run(organism, workspace, 8)
    run(organism, workspace, 12, "--workers", 2)
    assert stored_trials(workspace) == stored_trials(searched)
    assert manifest(workspace) == manifest(searched)
    finished = count_events(workspace)
    assert "nothing to do" in run(organism, workspace, 12)
    assert count_events(workspace) == finished


def test_an_export_is_made_again_without_its_scorers(organism: Path, searched: Path, tmp_path: Path) -> None:
    file, again = only_job(searched) / "export" / "reproduce.json", tmp_path / "again"
    abliterate("run", *job_arguments(organism), "--reproduce", file, "--workspace", again).check()
    weights = [
        {name: entry for name, entry in manifest(place)["files"].items() if name.endswith(".safetensors")}
        for place in (searched, again)
    ]
    assert weights[0] == weights[1]
