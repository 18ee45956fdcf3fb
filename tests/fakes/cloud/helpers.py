"""Helpers for tests of the launchers."""

from __future__ import annotations

import io
import json
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest

from job.cli.cloud_requirements import need_of_cards
from job.cli.main import main
from job.cloud.api import Patience
from job.cloud.credentials import open_market
from job.cloud.launch_records import Launch, LaunchFile
from job.cloud.launching import Launcher
from job.cloud.provider import MachineNeeds, Terms
from job.preflight.gpu_table import cards, offers_query
from tests.fakes.cloud import KEY, Platform, VastServer
from tests.helpers import Result

QUICK = Patience(tries=4, first_wait=0.01, longest_wait=0.05)
TOKEN = "hf_TestTokenTestToken1234"
COMMAND = ("run", "Qwen/Qwen3-8B", "--checkpoint", "hf://user/state", "--when-done", "destroy")
IMAGE = "registry.example.org/someone/job:1"


def need(on: str = "4xRTX4090", **changes: Any) -> MachineNeeds:
    return need_of_cards(on, 200).model_copy(update=changes)


def env_of(server: Platform, url: str | None = None) -> dict[str, str]:
    names = (
        ("VAST_URL", "VAST_API_KEY") if isinstance(server, VastServer) else ("RUNPOD_API_BASE_URL", "RUNPOD_API_KEY")
    )
    return {names[0]: url or server.url, names[1]: KEY, "HF_TOKEN": TOKEN, "HOME": "/nonexistent"}


def launcher(server: Platform, tmp_path: Path, said: list[str], url: str | None = None, **changes: Any) -> Launcher:
    platform: Any = "vast" if isinstance(server, VastServer) else "runpod"
    wanted = {"label": "abliterate-test", "platform": platform, "needs": (need(),), "terms": Terms(), "image": IMAGE}
    launch = Launch(**{**wanted, "command": COMMAND, **changes})
    market = open_market(platform, said.append, env=env_of(server, url), patience=QUICK)
    file = tmp_path / "launches" / "abliterate-test.json"
    return Launcher(market, LaunchFile(launch, file), said.append, every=0.02, look_seconds=0.4, ending_seconds=0.4)


def command(server: Platform, tmp_path: Path, *arguments: Any, **env: str) -> Result:
    """Run `abliterate cloud` in this process, which is quicker, and assert that its output holds no secret."""
    platform = "vast" if isinstance(server, VastServer) else "runpod"
    out, err, code = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        for name, value in {**env_of(server), "ABLITERATION_LAUNCHES": str(tmp_path / "launches"), **env}.items():
            patch.setenv(name, value)
        patch.setattr(sys, "argv", ["abliterate", "cloud", platform, *map(str, arguments)])
        try:
            main()
        except SystemExit as end:
            code = int(end.code or 0)
    result = Result(code, out.getvalue(), err.getvalue())
    written = "".join(file.read_text() for file in tmp_path.rglob("*") if file.is_file())
    for secret in (KEY, TOKEN, "Signature"):
        assert secret not in result.out + result.err + written
    return result


def survey(tmp_path: Path, **changes: Any) -> Path:
    """Write the output of `abliterate preflight --json`, by its own code."""
    from job.preflight.checks import Check
    from job.preflight.estimate import Hours
    from job.preflight.survey import Survey

    hours = Hours(download=1.0, load=0.1, residuals=0.1, baseline=0.1, search=2.0, export=0.2, upload=2.0)
    made = Survey(
        checks=(Check(name="gpu.memory", status="ok", measured="fits", needed="a plan"),),
        hours=hours,
        offers=offers_query(cards()[1], 4, 300 * 10**9),
    )
    file = tmp_path / "plan.json"
    file.write_text(json.dumps(made.model_copy(update=changes).as_json()))
    return file
