"""The command line: quick, and every bad input gets one clear line and its exit code."""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
import tomllib
import zipfile
from pathlib import Path

import pytest
import torch

from tests.helpers import COMMAND, UNMEASURED, abliterate, environment, only_job


@pytest.fixture
def prompts(tmp_path: Path) -> list[str]:
    arguments = []
    for name in ("good", "bad", "good-eval", "bad-eval"):
        (tmp_path / f"{name}.txt").write_text("one\ntwo\nthree\nfour\n")
        arguments += [f"--{name}-prompts", str(tmp_path / f"{name}.txt")]
    return [*arguments, "--workspace", str(tmp_path / "runs"), "--trials", "2"]


@pytest.fixture
def model(model_in_one_file: Path) -> Path:
    return model_in_one_file


def assert_nothing_is_left(tmp_path: Path) -> None:
    assert not (tmp_path / "runs").exists()


def test_help_is_quick() -> None:
    times = []
    for _ in range(5):
        begin = time.perf_counter()
        subprocess.run([*COMMAND, "--help"], check=True, capture_output=True, env=environment(**UNMEASURED))
        times.append(time.perf_counter() - begin)
    assert statistics.median(times) < 0.4


def test_the_command_line_loads_no_torch() -> None:
    code = "import sys, job.cli; assert not {'torch', 'transformers', 'optuna'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_surface() -> None:
    """Scripts rely on these; a change here is a change of the contract."""
    assert abliterate().out == abliterate("--help").out
    for command in (
        "run",
        "status",
        "front",
        "chat",
        "evaluate",
        "export",
        "inspect",
        "config show",
        "demo",
        "demo-model",
        "real-model",
    ):
        assert abliterate(*command.split(), "--help").check().out
    options = abliterate("run", "--help").out
    for option in (
        "--good-prompts", "--bad-prompts", "--good-eval-prompts", "--bad-eval-prompts", "--good-report-prompts",
        "--bad-report-prompts", "--workspace", "--trials", "--startup-trials", "--seed", "--config", "--set",
        "--new", "--upload", "--tune",
    ):  # fmt: skip
        assert option in options
    assert (
        abliterate("abliterate", "config", "show", "--help").check().out == abliterate("config", "show", "--help").out
    )


def test_words_that_cannot_be(model: Path, prompts: list[str], tmp_path: Path) -> None:
    assert abliterate("run", model, *prompts, "--no-such-option").code == 2
    assert abliterate("run", model, *prompts, "--trials", "many").code == 2
    (tmp_path / "empty").mkdir()
    abliterate("inspect", tmp_path / "empty").fails(3, "is not a model folder")
    assert_nothing_is_left(tmp_path)


def test_a_workspace_that_cannot_be_written(model: Path, prompts: list[str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    abliterate("run", model, *prompts, "--workspace", tmp_path / "file" / "runs").fails(76, "cannot write")
    abliterate("run", model, *prompts, "--workspace", "/proc/runs").fails(76, "cannot write")


def test_jobs_that_are_not_there(tmp_path: Path) -> None:
    for command in ("status", "front", "export"):
        abliterate(command, "--workspace", tmp_path).fails(2, "no job")


def test_demo_model_refuses_what_it_cannot_make(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    abliterate("demo-model", tmp_path).fails(2, "is not empty")
    (tmp_path / "file").touch()
    abliterate("demo-model", tmp_path / "file").fails(2, f"{tmp_path / 'file'} is not a folder")
    abliterate("demo-model", tmp_path / "new", "--arch", "bert").fails(2, "bert", "llama, qwen3")
    abliterate("demo-model", tmp_path / "new", "--size", "huge").fails(2, "huge", "tiny, small")
    assert not (tmp_path / "new").exists()


def test_config_show_prints_values_and_sources(model: Path, prompts: list[str], tmp_path: Path) -> None:
    shown = abliterate("config", "show", model, *prompts, ABLITERATE_SEED="7").check().out.splitlines()
    assert "trials = 2  # command line" in shown
    assert "seed = 7  # environment" in shown
    assert 'search.space = "wide"  # default' in shown
    assert "# startup_trials is not set" in shown


def test_the_wheel_holds_every_file_of_the_package(tmp_path: Path) -> None:
    root = Path(__file__).parents[3]
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path, root],
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "unpacked")
    files = {path.relative_to(root).as_posix() for path in (root / "job").rglob("*") if path.is_file()}
    assert {file for file in files if "__pycache__" not in file} <= set(names)
    assert not any(name.startswith("tests") for name in names)
    defaults = tomllib.loads((tmp_path / "unpacked" / "job" / "config" / "default.toml").read_text())
    assert defaults["seed"] == 0
    # The unpacked package loads its own defaults and templates, not those of the checkout.
    code = (
        "import job, job.config.load as s; print(job.__file__); print(s.default_values()['kl_tokens'])\n"
        "from job.text.templates import template\n"
        "print(template('job.report', 'page.html').filename)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path / "unpacked",
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "unpacked")},
    )
    package = tmp_path / "unpacked" / "job"
    assert done.stdout.split() == [str(package / "__init__.py"), "1", str(package / "report" / "page.html")]


def test_secrets_stay_out_of_tracebacks(model: Path, prompts: list[str], tmp_path: Path) -> None:
    """An unexpected error prints a traceback, with secrets redacted."""
    code = (
        "import sys, job.storage.jobs\n"
        "def broken(*_, **__): raise RuntimeError('token is swordfish-swordfish')\n"
        "job.storage.jobs.open_job = broken\n"
        f"sys.argv = {['abliterate', 'run', str(model), *prompts]!r}\n"
        "from job.cli.main import main; main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment(HF_TOKEN="swordfish-swordfish")
    )
    assert done.returncode == 1
    assert "RuntimeError: token is ***" in done.stderr
    assert "swordfish" not in done.stderr


def test_torch_is_the_build_that_the_constraints_name() -> None:
    pinned = (Path(__file__).parents[3] / "constraints.txt").read_text()
    assert f"torch=={torch.__version__.partition('+')[0]}\n" in pinned


def test_a_job_of_a_former_version_is_gone_on_with_and_one_of_a_later_version_is_refused(
    finished: Path, tmp_path: Path
) -> None:
    workspace = tmp_path / "runs"
    shutil.copytree(finished, workspace, symlinks=True)
    file = only_job(workspace) / "job.json"
    record = json.loads(file.read_text())
    del record["settings"]["batching"]["trials"], record["settings"]["grace"]
    file.write_text(json.dumps(record))
    assert "nothing to do" in abliterate("resume", "--workspace", workspace).check().err
    record["settings"]["invented_later"] = 1
    file.write_text(json.dumps(record))
    abliterate("resume", "--workspace", workspace).fails(2, "cannot read the settings", "continue with the version")
    assert ", chosen" in abliterate("front", "--workspace", workspace).check().out
    assert "was chosen" in abliterate("report", "--workspace", workspace).check().out
