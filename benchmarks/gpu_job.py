"""A whole job on the organism by the command line, uninterrupted and killed, for `benchmarks.gpu`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

from job.records import Trial
from job.search.study import read_trials
from job.storage.exports import SUMS
from job.system.failpoints import FAILPOINTS

TRIALS, BATCH, PROMPTS = 12, 4, 40


class Job:
    """A job on the organism's files, on a device."""

    def __init__(self, organism: Path, device: str) -> None:
        self._organism, self._device = organism, device
        self._folder = Path(tempfile.mkdtemp(prefix="gpu-job-"))

    @cached_property
    def uninterrupted(self) -> dict[str, Any]:
        """Run the job to its end; return its result."""
        workspace = self._folder / "whole"
        return {**self.finish(workspace), **self.result(workspace)}

    def start(self, workspace: Path, **variables: str) -> subprocess.Popen[bytes]:
        """Start the job, with further environment variables."""
        words = [sys.executable, "-m", "job", "run", str(self._organism / "model")]
        for option, file in (("prompts", "train"), ("eval-prompts", "test")):
            for kind in ("good", "bad"):
                words += [f"--{kind}-{option}", f"{self._organism / f'{kind}_{file}.txt'}#train[:{PROMPTS}]"]
        words += ["--workspace", str(workspace), "--trials", str(TRIALS), "--set", f"trials_per_batch={BATCH}"]
        words += ["--set", f"loading.device={self._device}", "--set", "probe_seconds=0"]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", **variables}
        return subprocess.Popen(words, stdout=sys.stderr, stderr=sys.stderr, env=environment)

    def finish(self, workspace: Path) -> dict[str, Any]:
        """Run the job to its end; raise if it fails."""
        begun = time.monotonic()
        code = self.start(workspace).wait()
        if code != 0:
            raise RuntimeError(f"the job ended with exit code {code}")
        return {"job_s": time.monotonic() - begun}

    def kill_in_search(self, workspace: Path) -> int:
        """Start the job, which is killed once its first batch of trials is stored; return how many are."""
        faults = self._folder / "faults"
        faults.mkdir()
        (faults / "kill@study:added").touch()
        code = self.start(workspace, **{FAILPOINTS: str(faults)}).wait()
        if code != -signal.SIGKILL:
            raise RuntimeError(f"the job that was to be killed ended with exit code {code}")
        return len(self._trials(workspace))

    def result(self, workspace: Path) -> dict[str, Any]:
        """Return a finished job's trials, the hashes of its export, and what its proof said."""
        (proof,) = [event["message"] for event in self._told(workspace, "export_proven")][-1:]
        (export,) = workspace.glob("*/export")
        scores = {trial.number: [trial.values.refusals, trial.values.kl] for trial in self._trials(workspace)}
        return {"proof": proof, "trials": scores, "sums": (export / SUMS).read_text()}

    def _trials(self, workspace: Path) -> list[Trial]:
        (study,) = workspace.glob("*/study.db")
        return read_trials(study)

    def _told(self, workspace: Path, name: str) -> list[dict[str, Any]]:
        files = workspace.glob("*/events.jsonl")
        lines = [line for file in files for line in file.read_text().splitlines() if f'"{name}"' in line]
        return [event for line in lines if (event := json.loads(line))["event"] == name]


def whole(job: Job) -> dict[str, Any]:
    """Run a job; its export is loaded afresh and compared by the job itself."""
    found = job.uninterrupted
    return {**found, "wrong": len(found["trials"]) != TRIALS, "summary": found["proof"]}


def resume(job: Job) -> dict[str, Any]:
    """Kill a job in its search, run it again, and compare it with the uninterrupted one."""
    workspace = job._folder / "killed"
    stored = job.kill_in_search(workspace)
    found = {**job.finish(workspace), **job.result(workspace)}
    expected = job.uninterrupted
    differ = [name for name in ("trials", "sums") if found[name] != expected[name]]
    said = f"differ in {', '.join(differ)}" if differ else "same trials, same export"
    return {**found, "killed_after": stored, "wrong": differ, "summary": f"killed after {stored} trials: {said}"}


PARTS: dict[str, Callable[[Any], dict[str, Any]]] = {"job": whole, "resume": resume}
