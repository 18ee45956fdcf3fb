"""`preflight` and `run` come to the same verdict on every input: the same exit code and the same line."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import date, datetime, timedelta, timezone
from pathlib import Path

import pytest

from job.data.prompts import PromptSets
from job.storage import jobs
from tests.cases import SETS, Case, Verdicts, contents, usual_lines, verdicts, write_brief
from tests.cases.models import DATED, MODELS, not_finite, template
from tests.cases.prompts import PROMPTS
from tests.cases.settings import OTHERS, PLACES
from tests.fakes.preloaded import preloaded
from tests.helpers import Result, abliterate, events, job_arguments, only_job, stored_trials

CASES: Mapping[str, Case] = {**MODELS, **PROMPTS, **OTHERS}
# A job has four sets of prompts: as many cases that only change prompts share one.
SHARING = [name for name, case in CASES.items() if case.prompts is not None and case.code == 0]
TOGETHER = [SHARING[start : start + len(SETS)] for start in range(0, len(SHARING), len(SETS))]
ALONE = [[name] for name in CASES if name not in SHARING]
SECRET = re.compile("KEY|TOKEN|SECRET")


@pytest.fixture(scope="session")
def brief(organism: Path, shared: Callable[[str, Callable[[Path], None]], Path]) -> Path:
    """Return an organism with few layers and prompts, for all that does not depend on what it says; read-only."""
    return shared("very-brief", lambda folder: write_brief(organism, folder))


# These take the way of another case to the same refusal, and are tried in the full lane.
LATER = {
    *("config.json empty", "config.json with a BOM", "config.json with a negative number"),
    *("generation_config.json cut off", "tokenizer_config.json cut off", "tokenizer.json cut off"),
    *("model-00002-of-00002.safetensors that git has not fetched", "an index that is a list"),
    *("model.safetensors with another type", "a weight that is infinite in one of two shards"),
    *("a stale key of FP8", "a secret that ends with a line break"),
    *("config.json a list", "config.json with an unknown activation", "tokenizer.json a list", "tokenizer.json empty"),
    *("tokenizer_config.json a list", "tokenizer_config.json empty", "generation_config.json a list"),
    *("parquet that names a column twice", "json lines that name a column twice", "an unknown family"),
}


@pytest.mark.parametrize(
    "names",
    [
        pytest.param(names, id=", ".join(names), marks=pytest.mark.full("fuzz") if names[0] in LATER else ())
        for names in (*ALONE, *TOGETHER)
    ],
)
def test_preflight_and_run_come_to_the_same_verdict(names: Sequence[str], brief: Path, tmp_path: Path) -> None:
    cases = [CASES[name] for name in names]
    found = verdicts(cases, brief, tmp_path)
    one = cases[0]
    assert (found.checked.code, found.ran.code) == (one.code, one.code), found.checked.out + found.ran.err
    printed = [text for ended in (found.checked, found.ran) for text in (ended.out, ended.err)]
    assert not any("Traceback" in text for text in printed)
    secrets = [value.strip("\"'\r\n\u200b") for name, value in one.environment.items() if SECRET.search(name)]
    assert not any(secret in text for secret in secrets for text in printed)
    for name, setting in zip(names, SETS, strict=False):
        for part in CASES[name].told:
            assert part in found.said(f"data.{setting}" if name in SHARING else one.check), name
    if one.code:
        assert_refused_alike(found, one)
        assert not list(tmp_path.glob("runs/*/job.json"))
        assert one.code == 2 or not (tmp_path / "runs").exists()
        return
    job = only_job(tmp_path / "runs")
    read = PromptSets.model_validate_json((job / "prompts.json").read_bytes())
    for name, setting in zip(names, SETS, strict=False):
        lines = usual_lines(brief, setting)
        if name in SHARING:
            expected = CASES[name].read(lines) if CASES[name].read else lines
            assert sorted(prompt.user for prompt in read.of_setting(setting)) == sorted(expected), name
    if one.proof is not None:
        one.proof(job, tmp_path / "model")


def assert_refused_alike(found: Verdicts, case: Case) -> None:
    failed = [check for check in found.checks if check["status"] == "fail"]
    assert all(check["remedy"] and "\n" not in check["measured"] for check in failed)
    assert bool(failed) == (case.code != 2)
    assert found.refusal
    assert found.end == found.refusal
    for part in case.told:
        assert part in found.end


@pytest.mark.parametrize("name", PLACES)
def test_what_is_no_folder_is_refused_as_a_place_by_both(name: str, brief: Path, tmp_path: Path) -> None:
    case = PLACES[name]
    found = verdicts([case], brief, tmp_path)
    assert (found.checked.code, found.ran.code) == (case.code, case.code), found.checked.out + found.ran.err
    if case.code:
        named = os.path.realpath(tmp_path / "place")
        assert named in found.refusal
        assert named in found.end
    else:  # the folder that the link names is made
        assert (tmp_path / "place").is_symlink()
        assert list((tmp_path / "made").iterdir())


@pytest.mark.parametrize("command", ["resume", "upload"])
def test_a_checkpoint_that_is_a_file_is_refused_by_whatever_continues_its_job(command: str, tmp_path: Path) -> None:
    (tmp_path / "place").write_text("a shopping list\n")
    abliterate(command, "--checkpoint", (tmp_path / "place").as_uri()).fails(76, str(tmp_path / "place"))


def test_weights_of_large_models_are_looked_at_while_they_are_loaded(brief: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(brief / "model", model)
    not_finite(model, float("nan"))
    # As preflight does with larger models.
    words = [model, *job_arguments(brief)[1:], "--workspace", tmp_path / "runs", "--allow", "model.weights"]
    abliterate("run", *words).fails(3, "has values that are not finite", str(model / "model.safetensors"))
    assert not list((tmp_path / "runs").rglob("residuals/*.safetensors"))


# The dates of these zones are never the same.
EARLY, LATE = {"TZ": "Etc/GMT+12"}, {"TZ": "Etc/GMT-14"}
A_DAY = 86400


def on_day(folder: Path, number: int, zone: dict[str, str]) -> dict[str, str]:
    """Return variables of a process whose clock starts at noon in the early zone, `number` days after its present day.

    At noon, since a first start close to midnight may be dated on the next day.
    """
    file = folder / f"day-{number}"
    if not file.exists():
        file.write_text(str(number * A_DAY - int(time.time()) % A_DAY))
    return {**zone, "LD_PRELOAD": str(preloaded("clock", folder)), "CLOCK_OFFSET": str(file)}


def test_prompts_are_dated_on_the_day_of_a_jobs_first_start(
    organism: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tmp_path / "model"
    shutil.copytree(organism / "model", model)
    template(DATED)(model)
    words = [str(model), *job_arguments(organism)[1:], "--set", "startup_trials=2", "--set", "trials_per_batch=2"]

    def run(name: str, trials: int, day: date, *more: str) -> Path:
        monkeypatch.setattr(jobs, "date", type("Clock", (date,), {"today": lambda: day}))
        abliterate("run", *words, "--workspace", tmp_path / name, "--trials", trials, *more).check()
        return only_job(tmp_path / name)

    one_day, the_next = date(2027, 12, 30), date(2027, 12, 31)
    whole = run("whole", 4, one_day)
    run("continued", 2, one_day)
    continued = run("continued", 4, the_next)
    again = run("again", 4, the_next, "--reproduce", str(whole / "export" / "reproduce.json"))
    days = [json.loads((job / "job.json").read_text())["resolution"]["date"] for job in (whole, continued, again)]
    assert days == [one_day.isoformat()] * 3
    assert stored_trials(whole.parent) == stored_trials(continued.parent)
    weights = [(job / "export" / "model.safetensors").read_bytes() for job in (whole, continued, again)]
    assert weights[0] == weights[1] == weights[2]


@pytest.mark.full("kills")
def test_a_job_with_a_dated_template_killed_one_day_and_resumed_the_next_ends_with_the_same_bytes(
    organism: Path, tmp_path: Path
) -> None:
    model, faults = tmp_path / "model", tmp_path / "faults"
    shutil.copytree(organism / "model", model)
    template(DATED)(model)
    words = [str(model), *job_arguments(organism)[1:], "--set", "startup_trials=2", "--set", "trials_per_batch=2"]

    def run(name: str, day: dict[str, str], *more: str) -> Result:
        # In processes of their own: each reads the clock once.
        arguments = ("run", *words, "--workspace", tmp_path / name, "--trials", 4, *more)
        return abliterate(*arguments, process=True, **day)

    today, tomorrow = on_day(tmp_path, 0, EARLY), on_day(tmp_path, 1, LATE)
    run("whole", today).check()
    faults.mkdir()
    (faults / "kill@study:added").touch()
    assert run("broken", {**today, "JOB_FAILPOINTS": str(faults)}).code == -signal.SIGKILL
    run("broken", tomorrow).check()
    whole, broken = only_job(tmp_path / "whole"), only_job(tmp_path / "broken")
    run("again", tomorrow, "--reproduce", str(whole / "export" / "reproduce.json")).check()
    again = only_job(tmp_path / "again")
    days = [json.loads((job / "job.json").read_text())["resolution"]["date"] for job in (whole, broken, again)]
    early = datetime.now(timezone(timedelta(hours=-12))) + timedelta(seconds=int((tmp_path / "day-0").read_text()))
    assert days == [early.date().isoformat()] * 3
    starts = [event["time"] for event in events(broken.parent) if event["event"] == "job_started"]
    assert starts[1] - starts[0] > A_DAY
    assert stored_trials(whole.parent) == stored_trials(broken.parent)
    assert contents(broken / "export") == contents(whole / "export")
    assert len(list((broken / "residuals").iterdir())) == len(list((whole / "residuals").iterdir()))
    weights = [(job / "export" / "model.safetensors").read_bytes() for job in (whole, again)]
    assert weights[0] == weights[1]
