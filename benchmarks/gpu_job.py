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

from job.storage.exports import SUMS

TRIALS, BATCH, PROMPTS = 12, 4, 40
_LOOK_S = 0.02


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

    def start(self, workspace: Path) -> subprocess.Popen[bytes]:
        """Start the job."""
        words = [sys.executable, "-m", "job", "run", str(self._organism / "model")]
        for option, file in (("prompts", "train"), ("eval-prompts", "test")):
            for kind in ("good", "bad"):
                words += [f"--{kind}-{option}", f"{self._organism / f'{kind}_{file}.txt'}#train[:{PROMPTS}]"]
        words += ["--workspace", str(workspace), "--trials", str(TRIALS), "--set", f"trials_per_batch={BATCH}"]
        words += ["--set", f"loading.device={self._device}", "--set", "probe_seconds=0"]
        return subprocess.Popen(words, stdout=sys.stderr, stderr=sys.stderr, env={**os.environ, "HF_HUB_OFFLINE": "1"})

    def finish(self, workspace: Path) -> dict[str, Any]:
        """Run the job to its end; raise if it fails."""
        begun = time.monotonic()
        code = self.start(workspace).wait()
        if code != 0:
            raise RuntimeError(f"the job ended with exit code {code}")
        return {"job_s": time.monotonic() - begun}

    def kill_in_search(self, workspace: Path) -> int:
        """Start the job, kill it once trials are stored but not all; return how many."""
        process = self.start(workspace)
        while process.poll() is None and not self._told(workspace, "trial"):
            time.sleep(_LOOK_S)
        process.send_signal(signal.SIGKILL)
        process.wait()
        return len(self._told(workspace, "trial"))

    def result(self, workspace: Path) -> dict[str, Any]:
        """Return a finished job's trials, the hashes of its export, and what its proof said."""
        (proof,) = [event["message"] for event in self._told(workspace, "export_proven")][-1:]
        trials = {event["number"]: event for event in self._told(workspace, "trial")}
        (export,) = workspace.glob("*/export")
        scores = {number: [one["refusals"], one["kl"]] for number, one in sorted(trials.items())}
        return {"proof": proof, "trials": scores, "sums": (export / SUMS).read_text()}

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
