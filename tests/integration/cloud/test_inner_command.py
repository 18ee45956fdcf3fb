"""The command for a rented machine is checked before anything is paid for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.fakes.cloud import RunPodServer, VastServer
from tests.fakes.cloud.helpers import COMMAND, IMAGE, command

START = ("launch", "--on", "4xRTX4090", "--image", IMAGE)


def refused(
    vast: VastServer, tmp_path: Path, words: tuple[Any, ...], *parts: str, before: tuple[str, ...] = ()
) -> None:
    """Assert that a command is refused without even a request for offers."""
    vast.add_ask(1)
    command(vast, tmp_path, *START, *before, "--", *words).fails(2, *parts)
    assert vast.requests == []


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (("rnu", "m"), "no command `abliterate rnu`"),
        (("run", "m", "--trails", "5"), "--trails"),
        (("run", "m", "--trials", "many"), "'--trials'"),
        (("run", "m", "--trials"), "--trials"),
        (("run", "m", "n"), "n"),
        (("run",), "model is not set"),
        (("run", "--help"), "only prints help"),
        (("run", "-h"), "only prints help"),
        (("config",), "incomplete"),
        (("config", "shwo"), "shwo"),
        (("run", "m", "--trials", "0"), "trials"),
        (("run", "m", "--set", "trails=5"), "did you mean trials"),
        (("run", "m", "--set", "trials"), "key=value"),
        (("run", "m", "--when-failed", "destory"), "destory"),
        (("run", "m", "--checkpoint", "s3:/bucket"), "s3:/bucket"),
        (("run", "m", "--upload", "user/model"), "user/model"),
        (("run", "m", "--profile", "nobody"), "no profile nobody"),
        (("resume", "--checkpoitn", "hf://user/state"), "--checkpoitn"),
        (("worker", "--checkpoint", "hf://user/state"), "--engine ray"),
    ],
)
def test_what_would_end_at_once_is_refused(vast: VastServer, tmp_path: Path, words: tuple[str, ...], part: str) -> None:
    refused(vast, tmp_path, words, part)
    refused(vast, tmp_path, ("abliterate", *words), part)


def test_the_environment_is_that_of_the_machine(
    vast: VastServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused(vast, tmp_path, COMMAND, "ABLITERATE_TRAILS", before=("--env", "ABLITERATE_TRAILS=5"))
    refused(vast, tmp_path, COMMAND, "trials", before=("--env", "ABLITERATE_TRIALS=none"))
    # Local variables that are not passed on have no effect.
    monkeypatch.setenv("ABLITERATE_TRIALS", "none")
    monkeypatch.setenv("ABLITERATE_CHECKPOINT", "hf://user/state")
    refused(vast, tmp_path, ("run", "m"), "no --checkpoint", before=("--interruptible",))
    passed = ("--env", "ABLITERATE_CHECKPOINT", "--interruptible")
    command(vast, tmp_path, *START, *passed, "--", "run", "m").check()


@pytest.mark.parametrize("option", ["--config", "--reproduce"])
def test_a_file_of_this_machine_is_refused(
    vast: VastServer, runpod: RunPodServer, tmp_path: Path, option: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine.toml").write_text("trials = 5\n")
    monkeypatch.chdir(tmp_path)
    for path in ("mine.toml", tmp_path / "mine.toml"):
        refused(vast, tmp_path, ("run", "m", option, path), f"{option} {path}", "rented machine will not find it")
    there = command(vast, tmp_path, *START, "--", "run", option, "/opt/theirs.toml").check()
    assert f"{option} /opt/theirs.toml cannot be checked here" in there.err
    on_volume = ("launch", "--on", "1xRTX4090", "--image", IMAGE, "--volume", "vol1", "--")
    command(runpod, tmp_path, *on_volume, "run", option, "/workspace/theirs.toml").check()


def test_what_only_exists_here_is_told_of(vast: VastServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vast.add_ask(1)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "good.txt").write_text("x\n")
    words = ["run", tmp_path, "--good-prompts", "good.txt", "--upload", "file:///out", "--checkpoint", "file:///state"]
    told = command(vast, tmp_path, *START, "--", *words).check().err
    for part in (
        f"MODEL {tmp_path} is a path",
        "--good-prompts good.txt is a path",
        "--upload file:///out is on the rented machine",
        "--checkpoint file:///state is on the rented machine",
    ):
        assert part in told
    told = command(vast, tmp_path, *START, "--", "bash", "-c", "true")
    assert "not checked" in told.err


def test_a_folder_on_the_machine_is_no_checkpoint_for_another(vast: VastServer, tmp_path: Path) -> None:
    for folder in ("file:///state", "file:///workspace/state"):
        words = ("run", "m", "--checkpoint", folder)
        refused(vast, tmp_path, words, "no --checkpoint off the machine", before=("--interruptible",))


def test_what_forgetting_it_costs_is_said_before_it_is_rented(vast: VastServer, tmp_path: Path) -> None:
    vast.add_ask(1)
    vast.fail("PUT", "/api/v0/asks/*", status=422, message="not now")
    result = command(vast, tmp_path, *START, "--", "run", "m")
    result.fails(76, "422")
    told = result.err
    assert "no --when-done: the machine bills on after the job until you destroy it: $1.60 an hour" in told
    assert (
        "no --when-failed: if the job fails, the machine bills on until you destroy it: $1.60 an hour, $38.40" in told
    )
    vast.faults.clear()
    ends = ("--when-done", "nothing", "--when-failed", "stop")
    assert "bills on" not in command(vast, tmp_path, *START, "--", "run", "m", *ends).check().err
    vast.add_ask(2)
    by_setting = ("--env", "ABLITERATE_WHEN_FAILED=stop")
    told = command(vast, tmp_path, *START, *by_setting, "--", "run", "m", "--set", "when_done=stop").check().err
    assert "bills on" not in told
