"""Output that is not read to its end, that cannot be written, and that is JSON whatever goes wrong."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from job.cli.main import app
from tests.helpers import Result, abliterate, environment, job_arguments, only_job, start
from tests.warm import COLD


def unread(*arguments: object, cold: bool = True) -> Result:
    """Run the command with a standard output that its reader has closed, as behind `head`."""
    reading, writing = os.pipe()
    os.close(reading)
    try:
        process = start(*arguments, cold=cold, stdout=writing)
    finally:
        os.close(writing)
    _, err = process.communicate(timeout=120)
    return Result(process.returncode, "", err)


def assert_quiet(ended: Result, code: int) -> None:
    """Assert an exit code, without a complaint about the output."""
    assert ended.code == code, ended.err
    assert not any(word in ended.err for word in ("Traceback", "Exception ignored", "Broken pipe", "BrokenPipe"))


@pytest.fixture
def workspace(finished: Path, tmp_path: Path) -> Path:
    shutil.copytree(finished, tmp_path / "runs", symlinks=True)
    return tmp_path / "runs"


@pytest.mark.parametrize("words", ["front", "front --json", "status --json", "report", "config show", "--help"])
def test_a_reader_that_has_seen_enough_is_no_failure(words: str, workspace: Path) -> None:
    place = [] if words in ("config show", "--help") else ["--workspace", workspace]
    assert_quiet(unread(*words.split(), *place), 0)


def test_runs_and_checks_end_by_their_verdict_although_nobody_reads_it(organism: Path, workspace: Path) -> None:
    words = [*job_arguments(organism), "--workspace", workspace, "--trials", 20]
    assert_quiet(unread("run", *words, cold=False), 0)
    assert_quiet(unread("preflight", *words, "--json", cold=False), 0)
    assert_quiet(unread("preflight", *words, "--upload", "file:///proc/here", cold=False), 76)


def test_watching_ends_with_its_reader(workspace: Path) -> None:
    state = only_job(workspace) / "state.json"
    state.write_text(json.dumps({**json.loads(state.read_text()), "state": "preempted"}))
    for form in ([], ["--json"]):
        assert_quiet(unread("status", "--watch", "--interval", 0.1, "--workspace", workspace, *form), 0)


@pytest.mark.parametrize("words", ["front", "front --json"])
def test_results_that_cannot_be_written_are_a_failure(words: str, finished: Path) -> None:
    with open("/dev/full", "w") as full:
        process = start(*words.split(), "--workspace", finished, cold=True, stdout=full.fileno())
    _, err = process.communicate(timeout=60)
    Result(process.returncode, "", err).fails(76, "cannot write the output: No space left on device")


def test_a_log_that_cannot_be_written_is_none(workspace: Path) -> None:
    with open("/dev/full", "w") as full:
        words = [*COLD, "report", "--workspace", str(workspace)]
        done = subprocess.run(words, stdout=subprocess.PIPE, stderr=full, env=environment(), text=True)
    assert done.returncode == 0
    assert done.stdout.startswith("#")


def with_json(command: Any, name: str = "") -> Iterator[str]:
    """Yield the names of all commands that print JSON."""
    for part, below in getattr(command, "commands", {}).items():
        yield from with_json(below, f"{name} {part}".strip())
    if any("--json" in parameter.opts for parameter in command.params):
        yield name


WITH_JSON = sorted(with_json(typer.main.get_command(app)))


def no_job(workspace: Path) -> None:
    shutil.rmtree(workspace)


def damaged_job(workspace: Path) -> None:
    (only_job(workspace) / "job.json").write_text("{")


def damaged_study(workspace: Path) -> None:
    for file in only_job(workspace).glob("*study*"):
        file.write_bytes(b"torn")


@pytest.mark.parametrize("spoil", [no_job, damaged_job, damaged_study])
@pytest.mark.parametrize("name", WITH_JSON)
def test_standard_output_is_json_or_empty_whatever_goes_wrong(
    name: str, spoil: Callable[[Path], None], organism: Path, workspace: Path
) -> None:
    spoil(workspace)
    taken = workspace.parent / "taken" / "organism"
    taken.mkdir(parents=True)
    (taken / "thesis.txt").write_text("years of work")
    words: dict[str, list[object]] = {
        "inspect": [workspace / "model"],
        "preflight": [*job_arguments(organism), "--workspace", workspace],
        "run": [*job_arguments(organism), "--workspace", workspace, "--bad-prompts", workspace / "none.txt"],
        "chat": ["--workspace", workspace, "--prompt", "Where is the kettle?", "--tokens", 1],
        "apply": [organism / "model", workspace / "edit.safetensors", workspace / "edited"],
        "config show": ["--profile", "unknown"],
        "demo": ["--workspace", taken.parent],
        "demo-model": [taken],
        "real-model": [taken],
    }
    for platform in ("vast", "runpod"):
        words |= {f"cloud {platform} {command}": ["abliterate-1a2b"] for command in ("watch", "fetch", "destroy")}
        words[f"cloud {platform} offers"] = ["--on", "1xH200"]
        words[f"cloud {platform} launch"] = ["--on", "1xH200", "--image", "example.org/job:1", "--", "run", "model"]
    ended = abliterate(*name.split(), "--json", *words.get(name, ["--workspace", workspace]))
    assert "Traceback" not in ended.err
    lines = [ended.out] if name != "chat" else ended.out.splitlines()
    for text in filter(None, lines):
        json.loads(text)
    assert ended.out or ended.err.count("error: ") == 1


def printed(ended: Result) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(ended.out)
    return found


def test_a_run_and_what_continues_it_end_with_one_object(organism: Path, workspace: Path, tmp_path: Path) -> None:
    """It is that of `status`, with what came of this run; the log goes to standard error."""
    place = ["--workspace", workspace]
    run = abliterate("run", *job_arguments(organism), *place, "--trials", 20, "--json").check()
    status = printed(abliterate("status", *place, "--json").check())
    came_to = {"report_file": str(only_job(workspace) / "report.md"), "missed_gate": None, "failed_targets": []}
    assert printed(run) == {**status, **came_to}
    assert status["state"] == "finished"

    target = f"file://{tmp_path / 'delivered'}"
    resumed = abliterate("resume", *place, "--upload", target, "--json").check()
    assert [upload["state"] for upload in printed(resumed)["uploads"]] == ["done"]
    assert "deliver" in resumed.err
    missed = abliterate("run", *job_arguments(organism), *place, "--trials", 20, "--max-kl", 1e-9, "--json")
    missed.fails(5, "max_kl is 1e-09")
    assert "max_kl is 1e-09" in printed(missed)["missed_gate"]


def test_a_delivery_ends_with_one_object_also_if_a_target_fails(workspace: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    bad, good = f"file://{tmp_path / 'file'}/below", f"file://{tmp_path / 'good'}"
    ended = abliterate("upload", "--workspace", workspace, "--upload", bad, "--upload", good, "--json")
    ended.fails(6, bad)
    found = printed(ended)
    assert [failed["target"] for failed in found["failed_targets"]] == [bad]
    assert {upload["target"]: upload["state"] for upload in found["uploads"]}[good] == "done"


def test_what_other_processes_print_stays_out_of_the_json() -> None:
    code = "import subprocess, sys\nfrom job.cli.options import json_alone\n"
    code += "with json_alone(True):\n    print('a library')\n    subprocess.run(['echo', 'a worker'])\nprint('{}')"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (ended.stdout, sorted(ended.stderr.splitlines())) == ("{}\n", ["a library", "a worker"])


def test_a_model_of_ours_is_named_with_the_command_that_edits_it(full_organism: Path) -> None:
    made = printed(abliterate("demo-model", full_organism, "--json").check())
    plain = abliterate("demo-model", full_organism).check()
    assert made["path"] == plain.out.strip() == str(full_organism)
    assert f"next: {shlex.join(made['command'])}\n" in plain.err


@pytest.mark.slow
def test_the_demo_ends_with_the_object_of_its_run(full_organism: Path, tmp_path: Path) -> None:
    shutil.copytree(full_organism, tmp_path / "organism")
    ended = abliterate("demo", "--workspace", tmp_path, "--trials", 4, "--json", ABLITERATE_SEARCH__METHOD="tpe")
    found = printed(ended.check())
    assert found["state"] == "finished"
    assert found["trials"]["done"] == 4
    assert found["report_file"] == str(only_job(tmp_path) / "report.md")
    assert "correct responses on these prompts" in ended.err
