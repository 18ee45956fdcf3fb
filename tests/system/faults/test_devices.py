"""Faults of devices: too little memory, a device that fails, a forward that hangs."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path

import pytest

from tests.helpers import abliterate, events, job_arguments, only_job, run_script, start, stored_trials

TRIALS = ("--trials", "16", "--set", "trials_per_batch=4")

# The machine's memory, as far as this process is concerned, ends a little above what it has taken by then.
SHORT = """
import ctypes, resource, sys, torch
M_ARENA_MAX = -8
assert ctypes.CDLL(None).mallopt(M_ARENA_MAX, 1)  # a thread's arena reserves 64 MB of addresses
from pathlib import Path
from job.model.device_faults import halving
from job.model.loading import load_model
from job.directions.residuals import extract_residuals
from job.scoring.prompt_batches import PromptBatches
from job.scoring.report_metrics import ReportMetrics
from job.data.prompts import Prompt
from job.text.refusal_markers import RefusalMarkers
from tests.helpers import loading
loaded = load_model(Path(sys.argv[1]), loading("float32"), lambda _: None)
prompts = [Prompt(user="Where is the red kettle kept? " * 10) for _ in range(256)]
told = []
def answers(rows):
    batches = PromptBatches.of(loaded, prompts, prompts[:8], rows, report=told.append)
    return [response.tokens for response in ReportMetrics(batches, RefusalMarkers(["sorry"]), 4).responses()]
expected = answers(2)
taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (taken + 60_000_000, resource.RLIM_INFINITY))
found = answers(256)
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
assert found == expected
print(len(told), told[0])
"""


def test_where_memory_does_not_suffice_forwards_are_halved(organism: Path) -> None:
    done = run_script(SHORT, organism / "model").check()
    assert "out of memory: trying again with 128 rows" in done.out


def plant(folder: Path, kind: str, count: int = 1) -> None:
    for number in range(count):
        (folder / f"{kind}-{number}").touch()


def when_searching(workspace: Path, process: subprocess.Popen[str], number: int) -> None:
    """Wait until the trial of a number has been told."""
    deadline = time.monotonic() + 240
    while f'"number": {number}, ' not in "".join(p.read_text() for p in workspace.glob("*/events.jsonl")):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.slow
def test_out_of_memory_in_the_search_lasts_as_a_smaller_layout(
    organism: Path, whole: Path, faults: Path, tmp_path: Path
) -> None:
    workspace = tmp_path / "runs"
    arguments = ["run", *job_arguments(organism), "--workspace", workspace, *TRIALS, "--set", "batching.rows=64"]
    process = start(*arguments, JOB_FAILPOINTS=str(faults))
    when_searching(workspace, process, 0)
    plant(faults, "memory", 2)
    assert process.wait(240) == 0, process.communicate()[1]
    process.communicate()
    told = [event["rows"] for event in events(workspace) if event["event"] == "out_of_memory"]
    assert told == [32, 16]
    resolution = json.loads((only_job(workspace) / "job.json").read_text())["resolution"]
    assert (resolution["rows"], resolution["search_rows"]) == (64, 16)
    # The trials are those of a job that was never short of memory: other layouts differ in the last bits at most.
    found, expected = stored_trials(workspace), stored_trials(whole)
    assert [trial["values"][0] for trial in found] == [trial["values"][0] for trial in expected]
    for one, other in zip(found, expected, strict=True):
        assert one["values"][1] == pytest.approx(other["values"][1], rel=1e-3, abs=1e-7)


@pytest.mark.slow
def test_a_device_that_fails_gets_a_fresh_process_three_times(
    organism: Path, whole: Path, faults: Path, tmp_path: Path
) -> None:
    workspace = tmp_path / "runs"
    arguments = ["run", *job_arguments(organism), "--workspace", workspace, *TRIALS]
    plant(faults, "accelerator")
    process = start(*arguments, JOB_FAILPOINTS=str(faults))
    when_searching(workspace, process, 3)
    assert not list(faults.iterdir())
    assert sum(event["event"] == "job_started" for event in events(workspace)) == 2
    process.kill()
    process.communicate()
    # From then on it goes on failing: a clear stop, and all trials are kept. In this process a restart is an error of
    # the tests' helper; what the command would start anew is started here.
    plant(faults, "accelerator", 9)
    for _ in range(3):
        with pytest.raises(AssertionError, match="the command restarts itself"):
            abliterate(*arguments, JOB_FAILPOINTS=str(faults))
    abliterate(*arguments, JOB_FAILPOINTS=str(faults)).fails(76, "the device failed", "illegal memory access")
    assert len(list(faults.iterdir())) == 9 - 4
    assert sum(event["event"] == "job_started" for event in events(workspace)) == 2 + 4
    kept = stored_trials(workspace)
    assert 4 <= len(kept) < 16
    status = json.loads(abliterate("status", "--workspace", workspace, "--json").check().out)
    assert (status["state"], status["trials"]["done"]) == ("failed", len(kept))
    for path in faults.iterdir():
        path.unlink()
    abliterate(*arguments).check()
    assert stored_trials(workspace) == stored_trials(whole)


@pytest.mark.slow
def test_a_hung_forward_ends_the_process_and_leaves_the_stacks(organism: Path, faults: Path, tmp_path: Path) -> None:
    workspace = tmp_path / "runs"
    arguments = ["run", *job_arguments(organism), "--workspace", workspace, *TRIALS, "--set", "hang_seconds=3"]
    process = start(*arguments, JOB_FAILPOINTS=str(faults))
    when_searching(workspace, process, 3)
    plant(faults, "hang")
    assert process.wait(60) == 75
    assert "a forward has hung for 3 s" in process.communicate()[1]
    assert "forward" in (only_job(workspace) / "stacks.txt").read_text()
    abliterate(*arguments).check()
    assert len(stored_trials(workspace)) == 16
