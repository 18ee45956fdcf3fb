"""Terminals that are closed while a job runs in them."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import signal
import subprocess
import termios
import time
from pathlib import Path

import pytest

from tests.helpers import abliterate, environment, job_arguments, only_job, stored_trials
from tests.warm import COLD

TRIALS = 40


def in_a_terminal(words: list[str], *, hears: bool) -> tuple[subprocess.Popen[bytes], int]:
    """Start the command as the foreground of a terminal of its own; return it and the terminal's other end."""
    leader, follower = pty.openpty()

    def take_terminal() -> None:
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
        signal.signal(signal.SIGHUP, signal.SIG_DFL if hears else signal.SIG_IGN)

    process = subprocess.Popen(
        [*COLD, *words],
        stdin=follower,
        stdout=follower,
        stderr=follower,
        env=environment(TERM="xterm"),
        start_new_session=True,
        preexec_fn=take_terminal,
    )
    os.close(follower)
    return process, leader


def read_until_trials(leader: int, workspace: Path, process: subprocess.Popen[bytes]) -> str:
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
    words = ["run", *job_arguments(organism), "--workspace", str(tmp_path / "runs"), "--trials", str(TRIALS)]
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
        assert done < TRIALS
        abliterate(*words).check()
    else:
        assert code == 0
        assert done == TRIALS
    assert (only_job(tmp_path / "runs") / "export" / "model.safetensors").is_file()
    assert len(stored_trials(tmp_path / "runs")) == TRIALS
