"""Commands in a PID namespace of their own, as on another machine: no process sees those of the other."""

from __future__ import annotations

import subprocess
from typing import Any

from tests.processes import start_script

UNSHARE = ["unshare", "--pid", "--fork", "--kill-child=SIGKILL", "--mount-proc"]
# What `unshare` with these options does, in a process that has loaded the slow libraries.
_CODE = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)

def made(result):
    if result:
        raise OSError(ctypes.get_errno(), "no namespace")

NEW_MOUNTS, NEW_PIDS, ALL_PRIVATE, DIE_WITH_PARENT = 0x20000, 0x20000000, 0x44000, 1
made(libc.unshare(NEW_PIDS | NEW_MOUNTS))
if child := os.fork():
    ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    os._exit(ended if ended >= 0 else 128 - ended)
made(libc.prctl(DIE_WITH_PARENT, 9))
made(libc.mount(b"none", b"/", None, ALL_PRIVATE, None))
made(libc.mount(b"proc", b"/proc", b"proc", 0, None))
from job.cli.main import main

main()
"""


def can_be_apart() -> bool:
    """Return whether this user and system allow it: it needs root and Linux."""
    try:
        return not subprocess.run([*UNSHARE, "true"], capture_output=True).returncode
    except FileNotFoundError:
        return False


def start_apart(*arguments: Any, env: dict[str, str]) -> subprocess.Popen[str]:
    """Start the command apart; the process that is returned only waits for it, and takes it along when it is killed."""
    return start_script(_CODE, *arguments, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
