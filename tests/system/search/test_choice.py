"""The choice of a whole job: finalists are measured on prompts held out for it, after kills and out of memory too."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from job.data.prompts import PromptSets
from job.records import JobRecord, MeasuredFinalists
from job.report.results import job_trials
from job.search.pareto import choose, pareto_front
from job.stages.measuring import FinalistScorer
from job.storage.atomic import read_record, write_record
from job.storage.run_folder import RunFolder
from job.system.failpoints import FAILPOINTS
from tests.helpers import Result, abliterate, events, only_job, start, stored_trials

# Large enough for several finalists in such a short search. Without known points, which would win at once.
TOLERANCE = 0.5
SAME = ("figures/finalists.json", "figures/rescored.json", "export/model.safetensors", "export/reproduce.json")


class Job:
    """A job with just enough prompts that some are held out for the choice."""

    def __init__(self, organism: Path, root: Path) -> None:
        self.root, self.model = root, str(organism / "model")
        self.prompts = []
        for option, name, count in (("", "train", 100), ("-eval", "test", 12)):
            for kind in ("good", "bad"):
                file = root / f"{kind}_{name}.txt"
                lines = (organism / file.name).read_text().splitlines(keepends=True)
                file.write_text("".join(lines[:count]))
                self.prompts += [f"--{kind}{option}-prompts", str(file)]
        self.whole = root / "whole"
        abliterate(*self.command(self.whole)).check()

    def command(self, workspace: Path, *more: object) -> list[object]:
        layout = ("--trials", 8, "--set", "trials_per_batch=4", "--set", "search.ahead=0", "--set", "batching.trials=2")
        layout = (*layout, "--set", f"choice.refusal_tolerance={TOLERANCE}", "--set", "search.known_points=false")
        layout = (*layout, "--set", "search.method=tpe")
        mirror = ("--checkpoint", workspace.with_suffix(".mirror").as_uri(), "--allow", "restarts.loop")
        return ["run", self.model, *self.prompts, "--workspace", workspace, *layout, *mirror, *more]

    def is_whole(self, workspace: Path) -> None:
        """Assert that a job's choice and bytes are the uninterrupted one's."""
        assert stored_trials(workspace) == stored_trials(self.whole)
        for file in SAME:
            assert (only_job(workspace) / file).read_bytes() == (only_job(self.whole) / file).read_bytes(), file


@pytest.fixture(scope="module")
def job(full_organism: Path, tmp_path_factory: pytest.TempPathFactory) -> Job:
    return Job(full_organism, tmp_path_factory.mktemp("choice"))


def test_finalists_are_measured_on_prompts_of_their_own_and_the_choice_is_told(job: Job) -> None:
    folder = RunFolder(only_job(job.whole))
    prompts = read_record(folder.prompts_file, PromptSets)
    measured = read_record(folder.finalists_file, MeasuredFinalists).scores
    trials = job_trials(folder)
    front = {trial.number: trial for trial in pareto_front(trials)[:8]}
    assert measured.keys() <= front.keys()
    assert next(iter(front)) in measured
    assert len(measured) > 1
    assert {len(scores.kl) for scores in measured.values()} == {6 + 20}
    assert {len(scores.forced_kl) for scores in measured.values()} == {20}
    assert (len(prompts.bad), len(prompts.bad_choice), len(prompts.good), len(prompts.good_choice)) == (80, 20, 80, 20)
    for trial in map(front.get, measured):
        assert trial is not None
        # The search's own figure, from batches of another shape.
        own = measured[trial.number].kl[:6]
        assert sum(own) / 6 == pytest.approx(trial.values.kl, rel=1e-3, abs=1e-6)
        # The first position is one of the eight.
        pairs = zip(measured[trial.number].kl[6:], measured[trial.number].forced_kl, strict=True)
        assert all(forced >= first / 8 * 0.999 - 1e-9 for first, forced in pairs)
    (told,) = [event for event in events(job.whole) if event["event"] == "choice"]
    number = json.loads(folder.state_file.read_text())["chosen"]
    assert told["number"] == number
    status = json.loads(abliterate("status", "--workspace", job.whole, "--json").check().out)
    assert told["message"] == f"chosen: trial {number}: {status['why']}"
    (best,) = [best for best in status["best"] if best["number"] == number]
    made = json.loads((folder.export_link / "reproduce.json").read_text())
    assert made["choice"] == best["choice"]
    assert made["resolution"]["choice"] == "bounds"
    assert (best["choice"]["bad_prompts"], best["choice"]["good_prompts"], best["choice"]["searched"]) == (20, 20, 6)
    assert best["choice"]["kl"] == pytest.approx(sum(measured[number].kl[6:]) / 20)
    points = json.loads(abliterate("front", "--workspace", job.whole, "--json").check().out)
    assert {point["number"]: point["choice"] for point in points}[number] == best["choice"]
    held_out = f"held out for the choice: {best['choice']['refusals']}/20"
    for command in ("front", "status"):
        assert held_out in abliterate(command, "--workspace", job.whole).check().out
    assert f"{number} (chosen)" in (text := folder.report_file.read_text())
    assert status["why"] in text
    card = (folder.export_link / "README.md").read_text()
    assert f"{best['choice']['refusals']} of 20, with" in card
    _spread_is_that_of_the_report(folder, prompts, made, card)


def _spread_is_that_of_the_report(folder: RunFolder, prompts: PromptSets, made: dict[str, Any], card: str) -> None:
    spread = made["edited"]["kl_spread"]
    assert 0 <= spread["median"] <= spread["ninetieth"] <= spread["largest"]
    assert spread["largest"] >= made["edited"]["kl"] >= spread["median"] / 2
    assert f"(no. {spread['prompt']})" in card
    # The prompt that is named is that of the divergence over more tokens.
    worst = prompts.good_report[made["edited"]["kl_more"]["spread"]["prompt"]].user
    assert worst not in card
    assert f"<q>{worst}</q>" in folder.page_file.read_text()


def test_the_prompt_that_moved_most_is_shown_escaped_redacted_and_only_among_others(job: Job, tmp_path: Path) -> None:
    workspace = tmp_path / "runs"
    shutil.copytree(job.whole, workspace, symlinks=True)
    folder = RunFolder(only_job(workspace))
    kept = json.loads(folder.prompts_file.read_text())
    for prompt in kept["good_report"]:
        prompt["user"] = "</q><script>alert(1)</script> swordfish-1234"
    folder.prompts_file.write_text(json.dumps(kept))
    abliterate("report", "--workspace", workspace, MY_SECRET="swordfish-1234").check()
    assert "<q>&lt;/q&gt;&lt;script&gt;alert(1)&lt;/script&gt; ***</q>" in folder.page_file.read_text()
    shutil.rmtree(folder.path / "answers")  # without answers the page shows no prompt
    abliterate("report", "--workspace", workspace).check()
    assert "<q>" not in folder.page_file.read_text()


@pytest.mark.slow
def test_a_job_killed_while_finalists_are_measured_comes_to_the_same(job: Job, tmp_path: Path) -> None:
    faults = tmp_path / "faults"
    faults.mkdir()

    def run(workspace: Path) -> Result:
        process = start(*job.command(workspace), loaded=True, **{FAILPOINTS: str(faults)})
        return Result(process.wait(300), "", process.communicate()[1])

    workspace = tmp_path / "runs"
    for point in ("finalists:measured", "written:finalists.json", "stage:export"):
        (faults / f"kill@{point}").touch()
        assert run(workspace).code == -signal.SIGKILL, point
        assert (only_job(workspace) / "figures" / "finalists.json").exists() is (point == "stage:export")
    # On an empty machine, from the mirror of a run that was killed after the finalists: none is measured again.
    shutil.rmtree(workspace)
    run(workspace).check()
    job.is_whole(workspace)


@pytest.mark.parametrize("form", ["merged", pytest.param("directions", marks=pytest.mark.full("kills"))])
def test_an_edit_is_made_again_with_its_figures_for_the_choice(job: Job, tmp_path: Path, form: str) -> None:
    workspace = tmp_path / "runs"
    shutil.copytree(job.whole, workspace, symlinks=True)
    made = Path(abliterate("export", "--workspace", workspace, "--format", form).check().out.strip())
    again = ["run", job.model, *job.prompts, "--workspace", tmp_path / "again", "--reproduce", made / "reproduce.json"]
    assert "all 1 files of weights equal" in abliterate(*again).check().err
    for name in ("reproduce.json", "README.md"):
        assert (only_job(tmp_path / "again") / "export" / name).read_bytes() == (made / name).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["local", pytest.param("ray", marks=pytest.mark.full("workers"))])
def test_workers_measure_finalists_alike(job: Job, tmp_path: Path, engine: str) -> None:
    workspace = tmp_path / "runs"
    # Ray not here, where it may have been used with another cluster: it reads a token once per process.
    abliterate(*job.command(workspace, "--workers", 2, "--engine", engine), process=engine == "ray").check()
    job.is_whole(workspace)


def _without_measurement(job: Job, place: Path) -> Path:
    """Return a copy of the whole job as it was before its finalists were measured."""
    workspace = place / "runs"
    shutil.copytree(job.whole, workspace, symlinks=True)
    folder = RunFolder(only_job(workspace))
    shutil.rmtree(folder.path / "exports")
    folder.export_link.unlink()
    for file in (folder.finalists_file, folder.state_file):
        file.unlink()
    return workspace


def test_memory_that_runs_out_while_finalists_are_measured_halves_the_rows(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace = _without_measurement(job, tmp_path)
    measure, asked = FinalistScorer.outcomes, []

    def outcomes(self: FinalistScorer, edits: Any, rows: int, keep: Any) -> Any:
        asked.append((len(edits), rows))
        if len(edits) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return measure(self, edits, rows, keep)

    monkeypatch.setattr(FinalistScorer, "outcomes", outcomes)
    abliterate(*job.command(workspace)).check()
    resolution = json.loads((only_job(workspace) / "job.json").read_text())["resolution"]
    assert asked[-1] == (1, 1)
    assert resolution["choice_rows"] == 1
    assert resolution["search_rows"] is None
    folders = [RunFolder(only_job(place)) for place in (workspace, job.whole)]
    small, whole = (read_record(folder.finalists_file, MeasuredFinalists).scores for folder in folders)
    assert small.keys() == whole.keys()
    for number, scored in small.items():
        assert (scored.refusals, scored.broken) == (whole[number].refusals, whole[number].broken)
        assert scored.kl == pytest.approx(whole[number].kl, rel=1e-3, abs=1e-6)
    states = [json.loads(folder.state_file.read_text())["chosen"] for folder in folders]
    assert states[0] == states[1]


def test_a_job_that_a_former_version_began_keeps_its_choice(job: Job, tmp_path: Path) -> None:
    workspace = _without_measurement(job, tmp_path)
    folder = RunFolder(only_job(workspace))
    record = read_record(folder.job_file, JobRecord)
    assert record.resolution is not None
    settings = {**record.settings, "choice": {"refusal_tolerance": TOLERANCE}}
    former = record.resolution.model_copy(update={"choice": None})
    write_record(folder.job_file, record.model_copy(update={"resolution": former, "settings": settings}))
    for left in ("prompts.json", "directions", "residuals"):
        path = folder.path / left
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    done = abliterate(*job.command(workspace)).check()
    assert "is chosen" not in done.err
    assert not folder.finalists_file.exists()
    prompts = read_record(folder.prompts_file, PromptSets)
    assert (len(prompts.bad), prompts.bad_choice) == (100, ())
    chosen = json.loads(folder.state_file.read_text())["chosen"]
    assert chosen == choose(job_trials(folder), 6, TOLERANCE).number
    made = json.loads((folder.export_link / "reproduce.json").read_text())
    assert "choice" not in made
    assert "choice" not in made["resolution"]


def test_a_reproduced_search_makes_the_same_choice(job: Job, tmp_path: Path) -> None:
    original = only_job(job.whole) / "export" / "reproduce.json"
    options = ("--workspace", tmp_path / "runs", "--reproduce", original, "--with-search")
    given = ["run", job.model, *job.prompts, *options]
    abliterate(*given).check()
    again = only_job(tmp_path / "runs")
    for file in SAME[:3]:
        assert (again / file).read_bytes() == (only_job(job.whole) / file).read_bytes(), file
