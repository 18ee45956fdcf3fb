"""Helpers for tests of the command line."""

from __future__ import annotations

import functools
import json
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil

from job.config.load import default_values
from job.config.sections import LoadingSettings
from job.export.reproduction import PromptsRecord, Reproduction
from job.lifecycle.supervisor import asked_when_failed
from job.records import EditParameters, Figures, KernelParameters, Resolution, Trial, TrialScores
from tests.processes import UNMEASURED, USUAL, Result, environment, run_script, start_script
from tests.warm import COLD, Warm, read_early, server_for

__all__ = ["UNMEASURED", "Result", "environment", "run_script", "start_script"]

COMMAND = COLD
# Processes that `start` began in the current test; any left over are killed.
STARTED: list[subprocess.Popen[str]] = []


def abliterate(
    *arguments: Any, cwd: Path | None = None, cold: bool = False, process: bool = False, **extra: str
) -> Result:
    """Run the command, in this process if possible.

    Args:
        arguments: Its arguments.
        cwd: Its working directory.
        cold: Start a process as users do, which loads everything.
        process: Start a process: for commands that restart or kill themselves, or whose CPU time or memory count.
        extra: Its environment variables.
    """
    env, words = environment(**extra), list(map(str, arguments))
    supervised = asked_when_failed(words, env) != "nothing"  # by a parent process
    # In this process the Hub's client must learn whether it is offline.
    if not cold and not process and not supervised and not read_early(env, USUAL) - {"HF_HUB_OFFLINE"}:
        from tests.inproc import can_run_here, run_here

        if can_run_here():
            return Result(*run_here(words, env, cwd))
    started = _start(arguments, env, cold, stdout=subprocess.PIPE, cwd=cwd)
    out, err = started.communicate()
    return Result(started.returncode, out, err)


def start(
    *arguments: Any, cold: bool = False, loaded: bool = False, stdout: int = subprocess.DEVNULL, **extra: str
) -> subprocess.Popen[str]:
    """Start the command in its own process; `loaded`: with our modules imported as well."""
    process = _start(arguments, environment(**extra), cold, loaded, stdout=stdout)
    STARTED.append(process)
    return process


def _start(
    arguments: tuple[Any, ...], env: dict[str, str], cold: bool, loaded: bool = False, **options: Any
) -> subprocess.Popen[str]:
    """Start the command, with the slow libraries preloaded where possible; cold ones load them as users' do."""
    words = list(map(str, arguments))
    server = None if cold else server_for(env, USUAL, ours=loaded)
    if server is None:
        return subprocess.Popen([*COLD, *words], stderr=subprocess.PIPE, text=True, env=env, **options)
    return Warm(server, words, stderr=subprocess.PIPE, text=True, env=env, **options)


def alone(test: Callable[[], None]) -> Callable[[], None]:
    """Run a test without arguments in its own process, undisturbed by other memory use."""

    @functools.wraps(test)
    def run() -> None:
        code = f"import {test.__module__} as tests; tests.{test.__name__}.__wrapped__()"
        run_script(code).check()

    return run


def wait_until(condition: Callable[[], bool], *processes: subprocess.Popen[str], seconds: float = 180) -> None:
    """Wait for a condition while processes are running."""
    deadline = time.monotonic() + seconds
    while not condition():
        for process in processes:
            assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.01)


def slowed_until(condition: Callable[[], bool], process: subprocess.Popen[str], seconds: float = 240) -> None:
    """Wait for a condition while a process gets a twentieth of its time, as on a slow machine."""
    deadline = time.monotonic() + seconds
    while not condition() and process.poll() is None and time.monotonic() < deadline:
        process.send_signal(signal.SIGSTOP)
        time.sleep(0.38)
        process.send_signal(signal.SIGCONT)
        time.sleep(0.02)


def worker_processes(run: int) -> list[psutil.Process]:
    """Return the living workers of a run on this machine, by the run's process id."""
    living = [child for child in psutil.Process(run).children() if child.status() != psutil.STATUS_ZOMBIE]
    return [child for child in living if any("spawn_main" in part for part in child.cmdline())]


def loading(*dtypes: str, device: str = "cpu") -> LoadingSettings:
    """Return default loading settings except for dtypes, device and response prefix."""
    given = {"dtypes": dtypes, "device": device, "response_prefix": ""}
    return LoadingSettings.model_validate({**default_values()["loading"], **given})


def made_from(**others: Any) -> Reproduction:
    """Return a reproduction with dummy values, overridden by `others`."""
    kernel = KernelParameters(max_weight=1.0, max_weight_position=3.0, min_weight=0.1, min_weight_distance=2.0)
    taken = {"split": "train", "start": 0, "stop": None, "column": None, "prefix": "", "suffix": ""}
    taken |= {"system_prompt": None, "max_characters": None}
    local = PromptsRecord(source={"sha256": "5" * 64}, taken=taken, count=7, sha256="6" * 64)
    defaults = {key: value for key, value in default_values().items() if key in ("directions", "ablation", "scoring")}
    made = Reproduction(
        versions={"abliteration-job": "1.2.3", "torch": "2.0"},
        model={"sha256": "4" * 64},
        base_model=None,
        behaviour="refusal",
        prompts={f"{kind}_prompts": local for kind in ("good", "bad", "good_eval", "bad_eval")},
        settings={"seed": 3, **defaults},
        startup_trials=4,
        trials=12,
        resolution=Resolution(dtype="float32", rows=64, layers=4),
        trial=Trial(number=9, params={}, values=TrialScores(refusals=2, kl=0.1)),
        edit=EditParameters(direction_index=1.5, kernels={"attention": kernel, "mlp": kernel}),
        base=Figures(bad_prompts=100, refusals=98, good_prompts=80, false_refusals=1),
        edited=Figures(
            bad_prompts=100,
            refusals=3,
            good_prompts=80,
            false_refusals=5,
            degenerate=2,
            false_degenerate=1,
            kl=0.0312,
            kl_interval=(0.02, 0.05),
        ),
        format="merged",
        weights={},
    )
    return made.model_copy(update=others)


def job_arguments(organism: Path) -> list[str]:
    return [
        str(organism / "model"),
        *("--good-prompts", str(organism / "good_train.txt")),
        *("--bad-prompts", str(organism / "bad_train.txt")),
        *("--good-eval-prompts", str(organism / "good_test.txt")),
        *("--bad-eval-prompts", str(organism / "bad_test.txt")),
        # Seconds faster than a descent; tests of that ask for it.
        *("--set", "search.method=tpe"),
    ]


def only_job(workspace: Path) -> Path:
    (job,) = [path.parent for path in workspace.glob("*/job.json")]
    return job


def stored_trials(workspace: Path) -> list[dict[str, Any]]:
    """Return number, parameters and values of all trials, read from study.db without our code."""
    found = {}
    with TemporaryDirectory() as folder:
        # A copy: reading rolls back half-written data of a killed process, which the job must do itself.
        for file in only_job(workspace).glob("study.db*"):
            try:
                shutil.copy(file, folder)
            except FileNotFoundError:
                continue  # the journal of a write that has just ended
        with closing(sqlite3.connect(Path(folder) / "study.db")) as db:
            for identifier, number, state in db.execute("SELECT trial_id, number, state FROM trials"):
                assert state == "COMPLETE"
                params = dict(
                    db.execute("SELECT param_name, param_value FROM trial_params WHERE trial_id = ?", (identifier,))
                )
                values = dict(db.execute("SELECT objective, value FROM trial_values WHERE trial_id = ?", (identifier,)))
                found[number] = {"number": number, "params": params, "values": values}
    return [found[number] for number in sorted(found)]


def die_while_writing(file: Path, *statements: str) -> None:
    """Execute statements in a transaction that is in the file when the process is killed."""
    script = (
        "import os, signal, sqlite3, sys",
        "db = sqlite3.connect(sys.argv[1])",
        "db.execute('PRAGMA cache_size = 1')",  # written before the commit
        "db.execute('BEGIN')",
        "[db.execute(statement) for statement in sys.argv[2:]]",
        "os.kill(os.getpid(), signal.SIGKILL)",
    )
    before = file.read_bytes()
    done = subprocess.run([sys.executable, "-c", "\n".join(script), file, *statements])
    assert done.returncode == -signal.SIGKILL
    assert file.read_bytes() != before


def events(workspace: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (only_job(workspace) / "events.jsonl").read_text().splitlines()]


def count_events(workspace: Path, event: str = "trial") -> int:
    """Return the number of events of a kind in a workspace, even while they are being written."""
    return sum(path.read_text().count(f'"event": "{event}"') for path in workspace.glob("*/events.jsonl"))


def manifest(workspace: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((only_job(workspace) / "export" / "manifest.json").read_text())
    return found
