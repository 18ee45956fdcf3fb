"""The whole job on the organism: done, proven, resumed, delivered."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
import signal
import time
from pathlib import Path

import pytest

from job.organism.world import expected_answer
from tests.helpers import (
    UNMEASURED,
    abliterate,
    count_events,
    events,
    job_arguments,
    manifest,
    only_job,
    run_script,
    start,
    stored_trials,
    wait_until,
)

pytestmark = pytest.mark.slow


def lines(file: Path) -> list[str]:
    return file.read_text().splitlines()


def processor_seconds() -> float:
    """Return the CPU seconds of ended child processes, independent of the machine's load."""
    times = os.times()
    return times.children_user + times.children_system


def test_the_organism_is_a_worthy_stand_in(full_organism: Path) -> None:
    for name in ("good_train", "good_test", "bad_train", "bad_test"):
        assert len(lines(full_organism / f"{name}.txt")) == len(set(lines(full_organism / f"{name}.txt"))) == 200
    for kind in ("good", "bad"):
        assert not set(lines(full_organism / f"{kind}_train.txt")) & set(lines(full_organism / f"{kind}_test.txt"))
    assert expected_answer("Where is the hexed red kettle kept?") == "The hexed red kettle is kept in the kitchen."
    with pytest.raises(ValueError, match="not a request"):
        expected_answer("Where is Paris?")
    # Repeating it in place changes nothing.
    stamp = (full_organism / "model" / "model.safetensors").stat().st_mtime_ns
    abliterate("demo-model", full_organism).check()
    assert (full_organism / "model" / "model.safetensors").stat().st_mtime_ns == stamp


def test_plain_transformers_finds_the_reported_figures(organism: Path, finished: Path) -> None:
    """A process without our package loads base and export and counts refusals and correct responses itself."""
    job = only_job(finished)
    code = """
import json, sys
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, prompts = sys.argv[1], json.load(sys.stdin)
model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
tokenizer.padding_side = "left"
texts = [tokenizer.apply_chat_template([{"role": "user", "content": p}], tokenize=False,
                                       add_generation_prompt=True) for p in prompts]
batch = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
out = model.generate(input_ids=batch.input_ids, attention_mask=batch.attention_mask, do_sample=False,
                     max_new_tokens=60)
assert not any(name == "job" or name.startswith("job.") for name in sys.modules)
json.dump(tokenizer.batch_decode(out[:, batch.input_ids.shape[1]:], skip_special_tokens=True), sys.stdout)
"""

    def answers(folder: Path, prompts: list[str]) -> list[str]:
        done = run_script(code, folder, asked=json.dumps(prompts), cwd=finished).check()
        return list(json.loads(done.out))

    def refused(found: list[str]) -> int:
        phrases = ("sorry", "as an ai", "i cannot", "i must decline")
        return sum(not answer or any(phrase in answer.lower() for phrase in phrases) for answer in found)

    base = json.loads((job / "figures" / "base.json").read_text())
    chosen = (job / "export").resolve().name
    edited = json.loads((job / "figures" / f"{chosen}.json").read_text())
    from job.data.prompts import PromptSets

    prompts = PromptSets.model_validate_json((job / "prompts.json").read_text())
    good, bad = ([p.user for p in group] for group in (prompts.good_report, prompts.bad_report))
    assert (base["refusals"], base["bad_prompts"]) == (20, 20)
    assert (base["false_refusals"], base["good_prompts"]) == (0, 20)
    found = answers(job / "export", good + bad)
    assert refused(found[20:]) == edited["refusals"]
    assert refused(found[:20]) == edited["false_refusals"]
    original = answers(organism / "model", good + bad)
    assert refused(original[20:]) == 20
    assert original[:20] == [expected_answer(prompt) for prompt in good]
    assert edited["refusals"] < 20  # 20 trials are few, but not none


def test_the_run_folder_tells_all(finished: Path) -> None:
    job = only_job(finished)
    status = json.loads(abliterate("status", "--workspace", finished, "--json").check().out)
    assert status["state"] == "finished"
    assert status["trials"] == {"done": 20, "target": 20, "running": 0}
    assert status["chosen"] in {best["number"] for best in status["best"]}
    assert Path(status["export"]).is_dir()
    assert status["job_id"] == job.name
    assert "finished" in abliterate("status", "--workspace", finished).check().out
    front = abliterate("front", "--workspace", finished).check().out
    assert f"trial {status['chosen']}:" in front
    points = json.loads(abliterate("front", "--workspace", finished, "--json").check().out)
    assert [point["number"] for point in points] == [best["number"] for best in status["best"]]
    (chosen,) = [point for point in points if point["chosen"]]
    assert (chosen["number"], chosen["exported"]) == (status["chosen"], ["merged"])
    assert chosen["report"] == json.loads((job / "figures" / f"trial-{chosen['number']:04d}.json").read_text())
    low, high = chosen["refusals_interval"]
    assert low <= chosen["refusals"] / chosen["prompts"] <= high
    assert f"Trial {status['chosen']} of 20 was chosen" in (job / "report.md").read_text()
    assert [event["number"] for event in events(finished) if event["event"] == "trial"] == list(range(20))


def test_the_snippet_of_the_card_loads_the_export_and_answers(finished: Path) -> None:
    export = only_job(finished) / "export"
    snippet = re.search(r"```python\n(.*?)```", (export / "README.md").read_text(), re.DOTALL)
    assert snippet is not None
    answer = run_script(snippet[1].replace("PATH", str(export)), cwd=finished).check().out
    assert len(answer.split()) > 3


def test_a_run_shows_the_best_trials_unless_asked_for_all(organism: Path, tmp_path: Path) -> None:
    shown = {}
    for name, options in (("brief", []), ("all", ["-v"])):
        told = abliterate("run", *job_arguments(organism), "--workspace", tmp_path / name, "--trials", 9, *options)
        lines = [line.partition("] ")[2] for line in told.check().err.splitlines()]
        assert all(re.match(r"\[\d+:\d\d\] ", line) for line in told.err.splitlines())
        shown[name] = [line for line in lines if re.match(r"trial +\d+: ", line)]
        assert len([event for event in events(tmp_path / name) if event["event"] == "trial"]) == 9
    assert len(shown["all"]) == 9
    assert shown["brief"] == [line for line in shown["all"] if line.endswith("best so far")]
    assert 0 < len(shown["brief"]) < 9
    assert "plan: 9 trials; weights on cpu (RAM)" in told.err
    number = json.loads((only_job(tmp_path / "all") / "state.json").read_text())["chosen"]
    assert f"chosen: trial {number}: 0/20 refused, KL " in told.err
    assert f"chosen: trial {number}: 0/20 refused, KL " in told.out
    assert f"next:   abliterate chat --workspace {tmp_path / 'all'}" in told.out


def test_nothing_in_an_export_names_a_host_a_path_or_a_time(finished: Path, organism: Path) -> None:
    export = only_job(finished) / "export"
    for path in export.iterdir():
        data = path.read_bytes()
        for folder in (finished, organism):
            assert str(folder).encode() not in data, path
        if path.suffix not in (".safetensors", ".png"):  # a short host name may well occur among such bytes
            assert not re.search(rf"\b{re.escape(os.uname().nodename)}\b", data.decode()), path
    text = (export / "README.md").read_text() + (export / "manifest.json").read_text()
    assert str(time.localtime().tm_year) not in text.replace("arXiv:2406", "").replace("et al. 2024", "")


def test_a_finished_job_is_found_finished_at_once_and_left_alone(organism: Path, finished: Path) -> None:
    def state() -> dict[str, int]:
        return {str(path): path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()}

    before = state()
    begin = processor_seconds()
    arguments = ["run", *job_arguments(organism), "--workspace", finished, "--trials", 20]
    result = abliterate(*arguments, cold=True, PYTHONPROFILEIMPORTTIME="1", **UNMEASURED).check()
    assert 0 < processor_seconds() - begin < 2
    assert "nothing to do" in result.err
    loaded = set(re.findall(r"^import time:.*\| +(\w+)$", result.err, re.MULTILINE))
    assert "pydantic" in loaded
    assert not loaded & {"torch", "transformers", "optuna", "sqlalchemy"}  # each takes longer than all the rest
    assert state() == before


def test_another_point_of_the_front_is_exported_beside_the_first(finished: Path, tmp_path: Path) -> None:
    workspace = tmp_path / "runs"
    shutil.copytree(finished, workspace, symlinks=True)
    status = json.loads(abliterate("status", "--workspace", workspace, "--json").check().out)
    other = next(best["number"] for best in status["best"] if best["number"] != status["chosen"])
    shown = abliterate("export", "--workspace", workspace, "--trial", other, cwd=tmp_path).check()
    export = only_job(workspace) / "exports" / f"trial-{other:04d}"
    assert shown.out.strip() == str(export)
    assert (export / ".done").exists()
    assert (only_job(workspace) / "export").resolve().name == f"trial-{status['chosen']:04d}"
    abliterate("export", "--workspace", workspace, "--trial", 99).fails(2, "no trial 99")


def test_more_trials_and_targets_extend_a_finished_job(organism: Path, finished: Path, tmp_path: Path) -> None:
    workspace = tmp_path / "runs"
    shutil.copytree(finished, workspace, symlinks=True)
    arguments = [*job_arguments(organism), "--workspace", workspace]
    target = tmp_path / "delivered"
    abliterate("run", *arguments, "--trials", 20, "--upload", target.as_uri()).check()
    assert json.loads((target / "manifest.json").read_text()) == manifest(finished)
    first = stored_trials(finished)
    abliterate("run", *arguments, "--trials", 22).check()
    assert stored_trials(workspace)[:20] == first
    assert len(stored_trials(workspace)) == 22
    uploads = json.loads((only_job(workspace) / "uploads.json").read_text())
    assert [upload["state"] for upload in uploads] == ["done"]


@pytest.mark.parametrize("form", ["merged", "directions"])
def test_an_export_states_all_trials_of_a_search_that_was_extended(
    organism: Path, finished: Path, tmp_path: Path, form: str
) -> None:
    workspace = tmp_path / "runs"
    shutil.copytree(finished, workspace, symlinks=True)
    words = ["run", *job_arguments(organism), "--workspace", workspace, "--export-format", form, "--trials"]
    target = tmp_path / "delivered"
    delivery = ("upload", "--workspace", workspace, "--trial", 0, "--format", form, "--upload", target.as_uri())
    for trials in (20, 21):
        abliterate(*words, trials).check()
        abliterate(*delivery).check()
        assert f"searched with {trials} trials" in (target / "README.md").read_text()
        export = only_job(workspace) / "export"
        assert json.loads((export / "reproduce.json").read_text())["trials"] == trials
        assert f"searched with {trials} trials" in (export / "README.md").read_text()
        for name, entry in json.loads((export / "manifest.json").read_text())["files"].items():
            assert hashlib.sha256((export / name).read_bytes()).hexdigest() == entry["sha256"]
    assert "nothing to do" in abliterate(*words, 21).check().err


def test_a_target_that_fails_keeps_the_result_and_exits_6(organism: Path, finished: Path, tmp_path: Path) -> None:
    workspace = tmp_path / "runs"
    shutil.copytree(finished, workspace, symlinks=True)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.txt").write_text("years of work")
    arguments = [*job_arguments(organism), "--workspace", workspace, "--trials", 20]
    uploads = ("--upload", (tmp_path / "taken").as_uri(), "--upload", (tmp_path / "free").as_uri())
    result = abliterate("run", *arguments, *uploads)
    result.fails(6, "holds something else")
    assert (tmp_path / "free" / "model.safetensors").exists()  # one failing does not stop another
    (tmp_path / "taken" / "thesis.txt").unlink()
    abliterate("run", *arguments, *uploads).check()
    assert (tmp_path / "taken" / "model.safetensors").exists()


def test_other_settings_in_the_same_workspace_need_new(organism: Path, finished: Path) -> None:
    result = abliterate("run", *job_arguments(organism), "--workspace", finished, "--seed", 9)
    result.fails(2, "seed was 0, is 9", "--new")
    assert len(list(finished.glob("*/job.json"))) == 1


@pytest.mark.full("kills")
def test_kills_at_random_moments_of_the_whole_job(organism: Path, finished: Path, tmp_path: Path) -> None:
    """Load, extraction, search and export: the result is the same to the byte, wherever the kills fall."""
    seed = int(os.environ.get("KILL_SEED", time.time_ns() % 10**6))
    print(f"KILL_SEED={seed}")  # shown when the test fails
    moments = random.Random(seed)
    workspace = tmp_path / "runs"
    arguments = ["run", *job_arguments(organism), "--workspace", workspace, "--trials", 20]
    for _ in range(6):
        process = start(*arguments, cold=True)  # kills may hit its startup, too
        time.sleep(moments.uniform(2.0, 8.0))
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
    abliterate(*arguments).check()
    assert stored_trials(workspace) == stored_trials(finished)
    assert manifest(workspace) == manifest(finished)


@pytest.mark.full("kills")
@pytest.mark.parametrize("batch", [1, 4])
def test_kill_in_the_middle_of_trial_7_leaves_the_trials_of_an_uninterrupted_run(
    organism: Path, finished: Path, tmp_path: Path, batch: int
) -> None:
    workspace = tmp_path / "runs"
    arguments = ["run", *job_arguments(organism), "--workspace", workspace, "--trials", 20]
    arguments += ["--set", f"trials_per_batch={batch}"]
    process = start(*arguments)
    wait_until(lambda: count_events(workspace) >= (7 if batch == 1 else 4), process)
    time.sleep(0.05)  # into the evaluation of trial 7 (or of the batch that holds it)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert len(stored_trials(workspace)) < 20
    assert json.loads(abliterate("status", "--workspace", workspace, "--json").check().out)["state"] == "preempted"
    abliterate(*arguments).check()
    if batch == 4:
        reference = finished
    else:
        reference = tmp_path / "reference"
        arguments[arguments.index(workspace)] = reference
        abliterate(*arguments).check()
    assert stored_trials(workspace) == stored_trials(reference)
    assert manifest(workspace) == manifest(reference)


@pytest.mark.parametrize("cold", [False, pytest.param(True, marks=pytest.mark.full("kills"))])
def test_signals_stop_with_75_and_the_same_command_continues(
    organism: Path, finished: Path, tmp_path: Path, cold: bool
) -> None:
    """One job is asked to stop in both ways, then finished."""
    workspace = tmp_path / "runs"
    arguments = ["run", *job_arguments(organism), "--workspace", workspace, "--trials", 20]
    for number in (signal.SIGTERM, signal.SIGINT):
        before = count_events(workspace)
        process = start(*arguments, cold=cold, loaded=True)  # cold: as users start it
        wait_until(lambda before=before: count_events(workspace) > before, process)
        os.kill(process.pid, number)
        begin = time.perf_counter()
        _, err = process.communicate(timeout=30)
        assert time.perf_counter() - begin < 10
        assert process.returncode == 75
        assert "Traceback" not in err
        assert "run the same command again" in err
        status = json.loads(abliterate("status", "--workspace", workspace, "--json").check().out)
        assert (status["state"], status["reason"]) == ("preempted", number.name)
    assert len(stored_trials(workspace)) < 20
    abliterate(*arguments).check()
    assert stored_trials(workspace) == stored_trials(finished)
    assert manifest(workspace) == manifest(finished)


def test_a_second_run_is_turned_away_and_status_answers_during_a_run(organism: Path, tmp_path: Path) -> None:
    workspace = tmp_path / "runs"
    arguments = ["run", *job_arguments(organism), "--workspace", workspace, "--trials", 400]
    process = start(*arguments, loaded=True)
    try:
        wait_until(lambda: count_events(workspace) >= 5, process)
        abliterate(*arguments).fails(4, f"process {process.pid}")
        begin = processor_seconds()
        result = abliterate("status", "--workspace", workspace, "--json", cold=True, **UNMEASURED).check()
        assert 0 < processor_seconds() - begin < 3
        status = json.loads(result.out)
        assert status["state"] == "running"
        assert status["trials"]["done"] >= 5
        assert status["eta_s"] > 0
        assert process.poll() is None  # status does not disturb the run
    finally:
        process.kill()
        process.communicate()


def test_a_job_in_low_precision_is_proven_within_bounds(organism: Path, tmp_path: Path) -> None:
    arguments = ["run", *job_arguments(organism), "--workspace", tmp_path / "runs", "--trials", 2]
    arguments += ["--set", 'loading.dtypes=["bfloat16"]', "--set", "ablation.row_normalization=full"]
    result = abliterate(*arguments).check()
    assert "loaded in bfloat16" in result.err
    assert "export verified: KL" in result.err
    assert (only_job(tmp_path / "runs") / "export" / ".done").exists()
