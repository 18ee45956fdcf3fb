"""Jobs whose edits are found by gradient, from the command to the export and back."""

from __future__ import annotations

import json
import re
import shutil
import signal
from pathlib import Path

import pytest
from safetensors.torch import load_file

from job.directions.learned import EXPORTED
from job.export.reproduction import read_reproduction
from job.gradient.problem import Problem
from job.numerics.gradient import EditVariables
from job.preflight.limits import read_memory
from job.records.edit_path import EditPath
from job.search.study import read_trials
from job.storage.atomic import read_record, sha256_file
from job.system.failpoints import FAILPOINTS
from job.tuning import memory_probe
from tests.helpers import abliterate, job_arguments, only_job, start, wait_until
from tests.system.faults.test_devices import plant

pytestmark = pytest.mark.slow

# As by default, against what the other tests ask for.
METHOD = ("--set", "search.method=auto", "--trials", "6")
FILES = {"good": "good_train", "bad": "bad_train", "good-eval": "good_test", "bad-eval": "bad_test"}


def job_of(organism: Path) -> list[str]:
    """Return arguments of a job on half the prompts: a descent reads them at each of its steps."""
    halves = [f"--{kind}-prompts={organism / file}.txt#train[:20]" for kind, file in FILES.items()]
    return [*job_arguments(organism), *halves]


@pytest.fixture(scope="module")
def found(organism: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    workspace = tmp_path_factory.mktemp("gradient") / "runs"
    told = abliterate("run", *job_of(organism), "--workspace", workspace, *METHOD).check()
    assert re.search(r"edits by gradient: \d+ stages", told.err)
    assert re.search(r"refusals 10/10 -> [01]/10", told.out)
    return workspace


def test_the_first_trials_are_the_stages_and_the_edit_goes_into_every_format(
    organism: Path, found: Path, tmp_path: Path
) -> None:
    workspace = tmp_path / "runs"
    shutil.copytree(found, workspace, symlinks=True)
    job = only_job(workspace)
    path = read_record(job / "directions" / "path.json", EditPath)
    trials = read_trials(job / "study.db")
    last = len(path.stages) - 1
    assert trials[0].params == {"path.position": last, "attention.scale": 1.0, "mlp.scale": 1.0}
    assert not (job / "gradient").exists()
    assert [file.name for file in (job / "directions").glob("learned-*")] == [f"learned-{path.directions}.safetensors"]
    export = (job / "export").resolve()
    made = read_reproduction(export / "reproduce.json")
    assert made.edit.directions is not None
    assert made.settings["search"]["method"] == made.resolution.method == "gradient"
    assert "method" not in json.loads((job / "job.json").read_text())["identity"]["search"]
    assert sha256_file(export / EXPORTED) == made.edit.directions.sha256 == path.directions
    assert "each layer's own direction, learned by gradient" in (export / "README.md").read_text()
    assert "Gradient descent moved the strengths and directions" in (export / "README.md").read_text()
    assert "learned by gradient" in (job / "report.md").read_text()
    page = (job / "report.html").read_text()
    for chart, kind in (("strength", "rect"), ("path-refusals", "dot"), ("path-kl", "dot")):
        drawn = page.partition(f'id="chart-{chart}"')[2].partition("</svg>")[0]
        assert drawn.count(kind) >= len(path.stages), chart
    gentlest, strongest = path.stages[-1], path.stages[0]
    for number, end in ((0, gentlest), (last, strongest)):
        stage = len(path.stages) - number
        cells = (f"trial {number}", stage, f"{end.beta:.3g}", end.steps, end.refusals, end.broken, f"{end.kl:.4g}")
        assert re.search(
            r"<tr>\s*" + r"\s*".join(rf"<t[dh][^>]*>{re.escape(str(cell))}</t[dh]>" for cell in cells), page
        )
    weights = (export / "model.safetensors").read_bytes()
    directions = abliterate("export", "--workspace", workspace, "--format", "directions").check().out.strip()
    abliterate("apply", organism / "model", directions, tmp_path / "applied").check()
    assert (tmp_path / "applied" / "model.safetensors").read_bytes() == weights
    adapter = Path(abliterate("export", "--workspace", workspace, "--format", "adapter").check().out.strip())
    assert load_file(adapter / "adapter_model.safetensors")

    # Reproduced elsewhere from the export alone; without its directions this is impossible.
    again = ["run", *job_of(organism), "--workspace", tmp_path / "again", "--reproduce", export / "reproduce.json"]
    (export / EXPORTED).rename(tmp_path / "directions")
    abliterate(*again).fails(2, "does not hold the directions")
    (tmp_path / "directions").rename(export / EXPORTED)
    shutil.rmtree(tmp_path / "again")
    assert "all 1 files of weights equal" in abliterate(*again).check().err
    status = json.loads(abliterate("status", "--workspace", workspace, "--json").check().out)
    assert status["best"][0]["params"].keys() == trials[0].params.keys()
    assert [stage["kl"] for stage in status["path"]["stages"]] == [stage.kl for stage in path.stages]
    told = abliterate("status", "--workspace", workspace).check().out
    assert f"edits by gradient: {len(path.stages)} stages, {gentlest.steps} steps; the last one, on held-out" in told


def is_found(workspace: Path, found: Path) -> None:
    """Assert that a job has come to the bytes of the uninterrupted one."""
    one, other = only_job(found), only_job(workspace)
    for name in ("directions/path.json", "export/model.safetensors", f"export/{EXPORTED}", "export/README.md"):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    assert read_trials(one / "study.db") == read_trials(other / "study.db")


def steps_kept(workspace: Path) -> int:
    """Return how many steps of a descent its run folder holds, 0 if none."""
    for file in workspace.glob("*/gradient/state.safetensors"):
        return int(load_file(file)["counts"][0])
    return 0


def test_a_job_that_was_killed_in_the_middle_of_its_descent_comes_to_the_same_bytes(
    organism: Path, found: Path, tmp_path: Path
) -> None:
    workspace = tmp_path / "runs"
    arguments = ["run", *job_of(organism), "--workspace", workspace, *METHOD]
    process = start(*arguments, loaded=True)
    wait_until(lambda: steps_kept(workspace) >= 16, process)  # one stage and a part of the next
    process.kill()
    process.communicate()
    assert not (only_job(workspace) / "directions" / "path.json").exists()
    abliterate(*arguments).check()
    is_found(workspace, found)


@pytest.mark.full("kills")
@pytest.mark.parametrize("points", [["written:state.safetensors"] * 2, ["stage:search"], ["written:path.json"]])
def test_a_job_that_was_killed_at_a_write_of_its_descent_comes_to_the_same_bytes(
    organism: Path, found: Path, tmp_path: Path, points: list[str]
) -> None:
    faults, workspace = tmp_path / "faults", tmp_path / "runs"
    faults.mkdir()
    arguments = ["run", *job_of(organism), "--workspace", workspace, *METHOD]
    for point in points:
        (faults / f"kill@{point}").touch()
        process = start(*arguments, **{FAILPOINTS: str(faults)})
        process.communicate()
        assert process.returncode == -signal.SIGKILL
    abliterate(*arguments).check()
    is_found(workspace, found)


@pytest.mark.full("kills")
def test_little_memory_makes_smaller_steps_of_the_same_edit(
    organism: Path, found: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    little = read_memory().model_copy(update={"available": 24 << 20})
    monkeypatch.setattr(memory_probe, "read_memory", lambda: little)
    # The path is all that counts here: one trial is enough.
    arguments = ["run", *job_of(organism), "--workspace", tmp_path / "runs", *METHOD, "--trials", "1"]
    told = abliterate(*arguments).check()
    assert re.search(r"gradient steps: (1|3|6|12) rows a forward pass, as memory allows", told.err)
    paths = [
        read_record(only_job(where) / "directions" / "path.json", EditPath) for where in (found, tmp_path / "runs")
    ]
    for one, other in zip(paths[0].stages, paths[1].stages, strict=True):
        assert (one.beta, one.refusals) == (other.beta, other.refusals)
        assert other.kl == pytest.approx(one.kl, rel=0.05, abs=1e-4)


def test_without_room_for_one_prompt_no_gradient_is_tried(
    organism: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    little = read_memory().model_copy(update={"available": 128 << 10})
    monkeypatch.setattr(memory_probe, "read_memory", lambda: little)
    tried: list[EditVariables] = []
    monkeypatch.setattr(Problem, "read_longest", lambda _, variables: tried.append(variables))
    arguments = ["run", *job_of(organism), "--workspace", tmp_path, *METHOD[:2], "--trials", "1"]
    told = abliterate(*arguments).check()
    assert "no edits by gradient: out of memory: gradients of one prompt take" in told.err
    assert not tried
    path = read_record(only_job(tmp_path) / "directions" / "path.json", EditPath)
    assert "gradients of one prompt" in (path.failed or "")


@pytest.mark.full("kills")
def test_a_descent_for_which_memory_does_not_suffice_gives_way_to_trials(
    organism: Path, tmp_path: Path, faults: Path
) -> None:
    workspace = tmp_path / "runs"
    process = start("run", *job_of(organism), "--workspace", workspace, *METHOD, **{FAILPOINTS: str(faults)})
    wait_until(lambda: steps_kept(workspace) > 0, process)
    plant(faults, "memory", 8)  # a step is halved down to one row first
    _, err = process.communicate()
    assert process.returncode == 0, err
    assert "no edits by gradient: out of memory" in err
    job = only_job(workspace)
    path = read_record(job / "directions" / "path.json", EditPath)
    assert not path.stages
    assert "out of memory" in (path.failed or "")
    assert not (job / "gradient").exists()
    trials = read_trials(job / "study.db")
    assert len(trials) == 6
    assert all("direction_index" in trial.params for trial in trials)


def test_a_study_that_has_begun_with_kernels_goes_on_with_them(organism: Path, finished: Path, tmp_path: Path) -> None:
    workspace = tmp_path / "runs"
    shutil.copytree(finished, workspace, symlinks=True)
    job = only_job(workspace)
    record = json.loads((job / "job.json").read_text())
    record["settings"]["search"]["method"] = "gradient"
    (job / "job.json").write_text(json.dumps(record))
    abliterate("resume", "--workspace", workspace, "--trials", 22).check()
    assert not (job / "directions" / "path.json").exists()
    assert "direction_index" in read_trials(job / "study.db")[21].params


def test_a_path_that_leaves_many_refusals_is_no_default(organism: Path, tmp_path: Path) -> None:
    # Most answers hold a marker, too.
    everywhere = ("--set", 'scoring.refusal_markers=["sorry", "is made of", "is kept in"]', "--trials", "2")
    told = abliterate("run", *job_arguments(organism), "--workspace", tmp_path, *METHOD, *everywhere).check()
    assert re.search(r"no edits by gradient: they leave \d+ of 10 held-out prompts refused or broken", told.err)
    job = only_job(tmp_path)
    assert "direction_index" in read_trials(job / "study.db")[0].params
    assert "method" not in read_reproduction(job / "export" / "reproduce.json").settings["search"]
    assert "edits by gradient: none: they leave" in abliterate("status", "--workspace", tmp_path).check().out
