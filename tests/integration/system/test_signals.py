"""Stop signals: the real signals, sent to separate processes."""

from __future__ import annotations

import subprocess
import sys

import pytest

SWALLOWED = """
import os, signal, time
from job.system.signals import StopSignals
from job.errors import Stopped

class Finalized:
    def __del__(self):
        os.kill(os.getpid(), signal.{name})
        for _ in range(1000):  # the handler runs, and raises, in here
            pass

signals = StopSignals()
with signals.installed():
    try:
        value = Finalized()
        del value
        time.sleep(20)
    except Stopped as stop:
        print("stopped by", stop)
"""

SHIELDED = """
import os, signal
from job.system.signals import StopSignals
from job.errors import Stopped

signals = StopSignals()
with signals.installed():
    try:
        with signals.shielded():
            os.kill(os.getpid(), signal.{name})
            print("whole", end=", ")
        print("never reached")
    except Stopped as stop:
        print("stopped by", stop)
"""

OBEYED = """
import os, signal
from job.system.signals import StopSignals
from job.errors import Stopped

signals = StopSignals()
with signals.installed():
    try:
        try:
            os.kill(os.getpid(), signal.{name})
        finally:
            with signals.shielded():
                print("tidied", end=", ")
            print("no further stop", end=", ")
    except Stopped as stop:
        print("stopped by", stop)
"""

TWICE = """
import os, signal
from job.system.signals import StopSignals

signals = StopSignals()
with signals.installed(), signals.shielded():
    os.kill(os.getpid(), signal.{name})
    os.kill(os.getpid(), signal.{name})
    print("never reached")
"""


def run(program: str, name: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", program.format(name=name)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_stop_that_a_finalizer_swallows_is_raised_again(name: str) -> None:
    done = run(SWALLOWED, name)
    assert (done.stdout, done.stderr, done.returncode) == (f"stopped by {name}\n", "", 0)


def test_a_shield_holds_a_stop_back_to_its_end() -> None:
    done = run(SHIELDED, "SIGTERM")
    assert (done.stdout, done.stderr, done.returncode) == ("whole, stopped by SIGTERM\n", "", 0)


def test_a_second_signal_leaves_at_once() -> None:
    done = run(TWICE, "SIGTERM")
    assert (done.stdout, done.returncode) == ("", 75)


def test_tidying_up_after_a_stop_is_not_stopped_by_the_same_one() -> None:
    done = run(OBEYED, "SIGTERM")
    assert (done.stdout, done.stderr) == ("tidied, no further stop, stopped by SIGTERM\n", "")
