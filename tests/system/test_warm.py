"""Processes with preloaded libraries equal those that users start."""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import abliterate, environment, job_arguments, run_script, start
from tests.warm import Warm

# Signals 32 and 33, which the C library reserves once threads need them.
_OF_THE_C_LIBRARY = 0b11 << 31


def look(pid: int) -> dict[str, Any]:
    """Return a process's inherited and initial state."""
    lines = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    links = {}
    for link in Path(f"/proc/{pid}/fd").iterdir():
        try:
            links[int(link.name)] = os.readlink(link).partition(":")[0]
        except FileNotFoundError:
            continue  # closed meanwhile
    return {
        **{name: int(lines[name], 16) & ~_OF_THE_C_LIBRARY for name in ("SigBlk", "SigIgn", "SigCgt")},
        "umask": lines["Umask"],
        "streams": [links[number] for number in (0, 1, 2)],
        "lines": [number for number, name in links.items() if number > 2 and name in ("pipe", "socket")],
        "folder": os.readlink(f"/proc/{pid}/cwd"),
        "group": os.getpgid(pid),
    }


def test_what_libraries_set_in_the_tests_process_starts_no_command_cold(monkeypatch: pytest.MonkeyPatch) -> None:
    before = environment()
    importlib.import_module("torch._inductor.fx_passes.numeric_utils")
    monkeypatch.delitem(sys.modules, "lm_eval", raising=False)  # a job of another test may have loaded it
    importlib.import_module("lm_eval")
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert os.environ["HF_XET_HIGH_PERFORMANCE"] == "1"
    assert environment() == before
    monkeypatch.setenv("AWS_PROFILE", "kitchen")
    assert environment() == {**before, "AWS_PROFILE": "kitchen"}


@pytest.mark.slow
def test_a_process_begins_and_ends_like_any_other(
    organism: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    seen = []
    for cold, number in ((True, signal.SIGKILL), (False, signal.SIGKILL), (False, signal.SIGTERM)):
        workspace = tmp_path / f"{cold}-{number}"
        process = start("run", *job_arguments(organism), "--workspace", workspace, "--trials", 400, cold=cold)
        request.addfinalizer(process.communicate)
        request.addfinalizer(process.kill)  # finalizers run in reverse order
        assert isinstance(process, Warm) is not cold
        while not list(workspace.glob("*/events.jsonl")):
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.01)
        # It is busy meanwhile: signals are briefly blocked and pipes are open.
        found, deadline = look(process.pid), time.monotonic() + 20
        while found != (seen[0] if seen else {**found, "lines": []}) and time.monotonic() < deadline:
            time.sleep(0.01)
            found = look(process.pid)
        seen.append(found)
        process.send_signal(number)
        err = process.communicate(timeout=60)[1]
        assert process.returncode == (75 if number == signal.SIGTERM else -number), err
        assert not Path(f"/proc/{process.pid}").exists()
    assert seen[0] == seen[1] == seen[2]
    assert seen[0]["lines"] == []


def test_what_a_command_is_given_and_says_is_the_same(tmp_path: Path) -> None:
    settings = ("config", "show", "--set", "trials=7")
    for arguments, more in (((), {}), (settings, {"ABLITERATE_SEED": "3"}), (("config", "show", "--no-such"), {})):
        cold, warm = (abliterate(*arguments, cwd=tmp_path, cold=cold, **more) for cold in (True, False))
        assert cold == warm
        assert warm.out or warm.code == 2


WHAT = """
import json, os, sys
from huggingface_hub import constants
names = {name.partition(".")[0] for name in sys.modules}
print(json.dumps([constants.HF_HOME, constants.ENDPOINT, sys.argv[1:], os.environ["HF_TOKEN"], sorted(names)]))
sys.exit(int(sys.argv[1]))
"""


def test_a_script_at_another_hub_finds_its_libraries_loaded_for_that_hub_and_nothing_of_ours(tmp_path: Path) -> None:
    hub = {"HF_HOME": str(tmp_path), "HF_ENDPOINT": "http://127.0.0.1:9"}
    for token in ("one", "other"):
        env = environment(HF_TOKEN=token, **hub)
        done = run_script(WHAT, 7, "and more", env=env)
        home, endpoint, words, given, names = json.loads(done.out)
        assert (done.code, home, endpoint) == (7, str(tmp_path), "http://127.0.0.1:9")
        assert (words, given) == (["7", "and more"], token)
        assert {"torch", "transformers"} <= {*names}
        assert "job" not in names
    assert json.loads(run_script(WHAT, 0, env=environment(HF_TOKEN="")).check().out)[0] != str(tmp_path)
    failed = run_script("import sys; sys.exit(sys.stdin.read())", asked="no soup")
    assert (failed.code, failed.out) == (1, "")
    assert "no soup" in failed.err
