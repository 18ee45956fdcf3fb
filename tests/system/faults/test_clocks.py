"""A wall clock that is set while a job runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from job.report.timings import phase_times
from tests.fakes.preloaded import preloaded
from tests.helpers import abliterate, events, job_arguments, only_job, start, stored_trials
from tests.system.faults.test_devices import TRIALS, when_searching

JUMP, LONGEST = 7200, 600


@pytest.mark.full("kills")
def test_a_clock_that_jumps_ends_nothing_and_is_in_no_duration(organism: Path, whole: Path, tmp_path: Path) -> None:
    workspace, offset = tmp_path / "runs", tmp_path / "offset"
    offset.write_text("0")
    words = ["run", *job_arguments(organism), "--workspace", workspace, *TRIALS, "--max-hours", "1"]
    words += ["--checkpoint", (tmp_path / "mirror").as_uri()]
    preload = {"LD_PRELOAD": str(preloaded("clock", tmp_path)), "CLOCK_OFFSET": str(offset)}
    process = start(*words, **preload, JOB_CHECKPOINT_PACE="1,60,0.02,0.1")
    when_searching(workspace, process, 3)
    offset.write_text(str(JUMP))
    when_searching(workspace, process, 7)
    status = json.loads(abliterate("status", "--workspace", workspace, "--json").check().out)
    assert (status["eta_s"] or 0) < LONGEST
    offset.write_text(str(-JUMP))
    assert process.wait(240) == 0, process.communicate()[1]
    process.communicate()
    assert stored_trials(workspace) == stored_trials(whole)
    told = events(workspace)
    times = [event["time"] for event in told]
    assert times == sorted(times)
    assert times[-1] - times[0] < LONGEST
    assert sum(phase.seconds for phase in phase_times(told)) < LONGEST
    assert json.loads((only_job(workspace) / "meter.json").read_text())["seconds"] < LONGEST
