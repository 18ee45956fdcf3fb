"""A command run in the tests' process behaves like a process, and leaves that process as it was."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import threading
import warnings
from pathlib import Path
from typing import Any

import numpy
import optuna
import pytest
import torch
from huggingface_hub import constants
from transformers.utils import logging as transformers_logging

from tests import helpers, inproc
from tests.helpers import abliterate, job_arguments, only_job, stored_trials
from tests.mirrors import read_tree


def state_of_this_process() -> dict[str, Any]:
    """Return all process state that a command changes."""
    return {
        "environment": dict(os.environ),
        "folder": Path.cwd(),
        "arguments": list(sys.argv),
        "streams": (sys.stdout, sys.stderr, sys.unraisablehook),
        "handlers": [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM)],
        "random": (random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state().tolist()),
        "torch": (torch.get_num_threads(), torch.is_grad_enabled(), torch.get_default_dtype()),
        "verbosity": (transformers_logging.get_verbosity(), optuna.logging.get_verbosity()),
        "filters": list(warnings.filters),
        "offline": constants.HF_HUB_OFFLINE,
        "threads": {thread for thread in threading.enumerate() if not thread.daemon},
        "restart": os.execv,
    }


def test_what_a_command_says_and_ends_with_is_what_a_process_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With bad settings, an expected failure, output, errors and nothing to do."""
    commands: list[tuple[tuple[str, ...], dict[str, str]]] = [
        ((), {}),
        (("config", "show", "--set", "trials=7"), {"ABLITERATE_SEED": "3"}),
        (("config", "show", "--no-such"), {}),
        (("config", "show", "--set", "trails=7"), {}),
        (("run", "absent", "--good-prompts", "absent.txt", "--workspace", "runs"), {}),
        (("status", "--workspace", "absent"), {}),
    ]
    ran: list[str] = []
    real = inproc.run_here
    monkeypatch.setattr(inproc, "run_here", lambda *given: ran.append("here") or real(*given))
    before = state_of_this_process()
    for arguments, more in commands:
        here = abliterate(*arguments, cwd=tmp_path, **more)
        assert state_of_this_process() == before
        assert here == abliterate(*arguments, cwd=tmp_path, process=True, **more)
        assert here.out or here.err
    assert ran == ["here"] * len(commands)


def test_what_cannot_run_here_is_a_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands whose libraries need another environment, and those of other threads."""
    monkeypatch.setattr(inproc, "run_here", None)
    show = ("config", "show")
    assert abliterate(*show, cwd=tmp_path, HF_HOME=str(tmp_path)).check().out
    found: list[helpers.Result] = []
    thread = threading.Thread(target=lambda: found.append(abliterate(*show, cwd=tmp_path)))
    thread.start()
    thread.join()
    assert found[0].check().out


def test_a_restart_and_pytests_alarm_are_not_the_commands(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def restart() -> None:
        os.execv(sys.executable, [sys.executable])

    monkeypatch.setattr(inproc, "main", restart)
    left = signal.setitimer(signal.ITIMER_REAL, 500)
    try:
        with pytest.raises(AssertionError, match="restarts itself"):
            inproc.run_here(["run"], dict(os.environ), tmp_path)
        assert 400 < signal.getitimer(signal.ITIMER_REAL)[0] <= 500
    finally:
        signal.setitimer(signal.ITIMER_REAL, *left)


@pytest.mark.slow
def test_a_job_comes_to_what_a_process_of_its_own_comes_to(organism: Path, finished: Path, tmp_path: Path) -> None:
    """Run after another job, which must leave no trace; `finished` comes from a cold process."""
    torch.manual_seed(5)
    random.seed(5)
    for name, given in (("other", ("--trials", 2, "--seed", 5)), ("same", ("--trials", 20))):
        before = state_of_this_process()
        done = abliterate("run", *job_arguments(organism), "--workspace", tmp_path / name, *given).check()
        assert state_of_this_process() == before
        assert "refusals 20/20 ->" in done.out
    assert stored_trials(tmp_path / "same") == stored_trials(finished)
    exports = [(only_job(workspace) / "export").resolve() for workspace in (tmp_path / "same", finished)]
    assert read_tree(exports[0]) == read_tree(exports[1])
    assert json.loads((only_job(tmp_path / "same") / "state.json").read_text())["state"] == "finished"
