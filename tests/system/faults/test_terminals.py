"""Terminals that are closed while a job runs in them."""

from __future__ import annotations

import os
import pty
import select
import subprocess
import time
from pathlib import Path

import pytest

from tests.helpers import abliterate, job_arguments, only_job, start_script, stored_trials
from tests.warm import MAIN

# As a shell does for the foreground of a terminal, before the command has read any of that.
TAKE_TERMINAL = """
import fcntl, os, signal, termios
os.setsid()
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
signal.signal(signal.SIGHUP, signal.{heeds})
os.environ["TERM"] = "xterm"
"""


def in_a_terminal(words: list[str], *, hears: bool) -> tuple[subprocess.Popen[str], int]:
    """Start the command as the foreground of a terminal of its own; return it and the terminal's other end."""
    leader, follower = pty.openpty()
    code = TAKE_TERMINAL.format(heeds="SIG_DFL" if hears else "SIG_IGN") + MAIN
    process = start_script(code, *words, stdin=follower, stdout=follower, stderr=follower)
    os.close(follower)
    return process, leader


def read_until_trials(leader: int, workspace: Path, process: subprocess.Popen[str]) -> str:
    """Read what is shown until the first trial is done: an unread terminal blocks the command."""
    shown, deadline = b"", time.monotonic() + 180
    while not any('"event": "trial"' in path.read_text() for path in workspace.glob("*/events.jsonl")):
        assert time.monotonic() < deadline, shown.decode(errors="replace")
        assert process.poll() is None, shown.decode(errors="replace")
        if select.select([leader], [], [], 0.05)[0]:
            shown += os.read(leader, 1 << 16)
    return shown.decode(errors="replace")


@pytest.mark.parametrize("hears", [True, False], ids=["SIGHUP", "nohup"])
def test_a_closed_terminal_stops_a_run_or_does_not_matter(hears: bool, organism: Path, tmp_path: Path) -> None:
    trials = 40 if hears else 8  # the one that is stopped must have some left
    words = ["run", *job_arguments(organism), "--workspace", str(tmp_path / "runs"), "--trials", str(trials)]
    process, leader = in_a_terminal(words, hears=hears)
    try:
        assert "ETA" in read_until_trials(leader, tmp_path / "runs", process)
        os.close(leader)
        code = process.wait(180)
    finally:
        process.kill()
        process.wait()
    done = len(stored_trials(tmp_path / "runs"))
    if hears:
        assert code == 75
        assert done < trials
        abliterate(*words).check()
    else:
        assert code == 0
        assert done == trials
    assert (only_job(tmp_path / "runs") / "export" / "model.safetensors").is_file()
    assert len(stored_trials(tmp_path / "runs")) == trials
