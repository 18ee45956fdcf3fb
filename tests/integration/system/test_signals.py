"""Stop signals where no handler is installed."""

from __future__ import annotations

import subprocess
import sys

CODE = """
from job.system.signals import StopSignals

StopSignals().interrupt("the lease is lost")
print("alive")
"""


def test_a_lost_lease_does_not_end_a_program_that_handles_no_signals() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "alive\n"), done.stderr
