"""Test processes: their environment, exit and scripts. Imports nothing of ours but `tests.warm`."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tests.warm import Warm, server_for


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str

    def check(self) -> Result:
        assert self.code == 0, self.err
        return self

    def fails(self, code: int, *parts: str) -> None:
        """Assert one clear line with these parts, the exit code and no traceback."""
        assert self.code == code, (self.code, self.err)
        assert "Traceback" not in self.err
        lines = [line for line in self.err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, self.err
        for part in parts:
            assert part in lines[0], (part, lines[0])


_AT_START = dict(os.environ)
# Variables that tests set here for commands. Any other change since the start comes from a library that some test
# process loaded or used.
_GIVEN = ("AWS_", "HF_TOKEN", "PATH")


# Tests of jobs do not depend on the machine's speed.
_COMMON = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "ABLITERATE_PROBE_SECONDS": "0"}


def environment(**extra: str) -> dict[str, str]:
    """Return an environment without the caller's settings and without variables set by libraries."""
    kept = {name: value for name, value in _AT_START.items() if not name.startswith(_GIVEN)}
    given = {name: value for name, value in os.environ.items() if name.startswith(_GIVEN)}
    return {**_own(kept), **given, **_COMMON, **extra}


def _own(variables: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in variables.items() if not name.startswith("ABLITERATE_")}


# A server must not inherit a test's value.
USUAL = {**_own(_AT_START), **_COMMON}


# For timed runs: coverage measurement would count.
UNMEASURED = {"COVERAGE_PROCESS_START": "", "COVERAGE_PROCESS_CONFIG": ""}


def start_script(code: str, *arguments: Any, **options: Any) -> subprocess.Popen[str]:
    """Start Python code in its own process, with torch and transformers preloaded where possible, but nothing of ours.

    Args:
        code: The code; its arguments are in `sys.argv[1:]`.
        arguments: Its arguments.
        options: Those of Popen; the default environment is that of the tests' commands.
    """
    words, env = list(map(str, arguments)), options.pop("env", None) or environment()
    server = server_for(env, USUAL)
    if server is None:
        return subprocess.Popen([sys.executable, "-c", code, *words], text=True, env=env, **options)
    return Warm(server, words, script=code, text=True, env=env, **options)


def run_script(code: str, *arguments: Any, asked: str | None = None, **options: Any) -> Result:
    """Run Python code as `start_script` does, with an input."""
    streams = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    started = start_script(code, *arguments, **streams, **options)
    out, err = started.communicate(asked)
    return Result(started.returncode, out, err)
