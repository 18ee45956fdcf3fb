"""Fetching, destroying, and the sources of keys."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from job.cloud import api
from job.cloud.api import CloudError
from job.cloud.credentials import open_market
from job.cloud.launching import environment
from job.errors import UsageError
from tests.fakes.cloud import KEY, RunPodServer, VastServer
from tests.fakes.cloud.helpers import COMMAND, IMAGE, QUICK, TOKEN, command, env_of


def test_fetch_brings_the_log_and_says_what_it_cannot(vast: VastServer, tmp_path: Path) -> None:
    vast.add_instance(9)
    vast.log_text = f"trial 1\nHF_TOKEN={TOKEN}\n"
    result = command(vast, tmp_path, "fetch", "9", tmp_path / "out").check()
    assert (tmp_path / "out" / "9.log").read_text() == "trial 1\nHF_TOKEN=***\n"
    assert json.loads((tmp_path / "out" / "9.json").read_text())["state"] == "running"
    assert "vastai copy C.9:/workspace/" in result.err


def test_fetch_reads_a_stream_that_stays_open(runpod: RunPodServer, tmp_path: Path) -> None:
    runpod.add_pod("abc")
    runpod.log_lines = ["one", f"two {TOKEN}", "three"]
    result = command(runpod, tmp_path, "fetch", "abc", tmp_path / "out").check()
    assert (tmp_path / "out" / "abc.log").read_text() == "one\ntwo ***\nthree\n"
    assert "runpodctl send" in result.err


def test_a_stream_that_is_never_silent_is_left(
    runpod: RunPodServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api, "_STREAM_SECONDS", 0.5)
    runpod.add_pod("abc")
    runpod.chatter = True
    command(runpod, tmp_path, "fetch", "abc", tmp_path / "out").check()
    assert (tmp_path / "out" / "abc.log").read_text().startswith("trial 1: done\nagain\nagain\n")


def test_fetch_of_what_is_gone(vast: VastServer, tmp_path: Path) -> None:
    result = command(vast, tmp_path, "fetch", "9", tmp_path / "out").check()
    assert "are gone" in result.err
    assert not (tmp_path / "out" / "9.log").exists()


def test_destroy(vast: VastServer, runpod: RunPodServer, tmp_path: Path) -> None:
    vast.add_instance(9)
    command(vast, tmp_path, "destroy", "9").fails(2, "--yes")
    assert 9 in vast.instances
    assert command(vast, tmp_path, "destroy", "9", "--yes").check().out == "destroyed 9\n"
    assert vast.instances == {}
    assert "does not exist" in command(vast, tmp_path, "destroy", "9", "-y").check().out
    runpod.add_pod("abc")
    command(runpod, tmp_path, "destroy", "abc", "--yes").check()
    assert runpod.pods == {}


def test_destroy_by_the_label_of_a_launch(vast: VastServer, tmp_path: Path) -> None:
    vast.add_ask(1)
    launched = command(vast, tmp_path, "launch", "--on", "4xRTX4090", "--image", IMAGE, "--", *COMMAND).check()
    command(vast, tmp_path, "destroy", launched.out.strip(), "--yes").check()
    assert vast.instances == {}


def test_keys_come_from_where_the_platforms_tools_keep_them(
    vast: VastServer, runpod: RunPodServer, tmp_path: Path
) -> None:
    for server, platform, file, text in (
        (vast, "vast", ".config/vastai/vast_api_key", KEY + "\n"),
        (vast, "vast", ".vast_api_key", KEY),
        (runpod, "runpod", ".runpod/config.toml", f'[default]\napi_key = "{KEY}"\n'),
        (runpod, "runpod", ".runpod/config.toml", f"apikey = '{KEY}'\n"),
    ):
        home = tmp_path / str(len(list(tmp_path.iterdir())))
        (home / file).parent.mkdir(parents=True)
        (home / file).write_text(text)
        env = {"HOME": str(home), "VAST_URL": vast.url, "RUNPOD_API_BASE_URL": runpod.url}
        market = open_market(platform, print, env=env, patience=QUICK)  # type: ignore[arg-type]
        assert market.instances() == []
        assert server.requests[-1].status == 200
        with pytest.raises(UsageError, match="no key"):
            open_market(platform, print, env={"HOME": str(tmp_path / "nobody")})  # type: ignore[arg-type]


def test_the_key_follows_no_redirect(vast: VastServer, runpod: RunPodServer) -> None:
    vast.fail(status=307, headers={"Location": f"{runpod.url}/v2/pods"})
    with pytest.raises(CloudError, match="307"):
        open_market("vast", print, env=env_of(vast), patience=QUICK).instances()
    assert runpod.requests == []


def test_what_is_passed_on_does_not_come_back_in_messages(vast: VastServer) -> None:
    vast.fail(status=422, message="bad value: no-known-form-42")
    market = open_market("vast", print, env=env_of(vast), secrets=("no-known-form-42",))
    with pytest.raises(CloudError, match=r"422.*bad value: \*\*\*"):
        market.instances()


def test_the_environment_of_an_instance() -> None:
    assert environment(["A"], {"B": "2"}, {"A": "1", "C": "3"}) == {"A": "1", "B": "2"}
    for names, plain in (
        (["RUNPOD_API_KEY"], {}),
        ([], {"VAST_API_KEY": "x"}),
        (["MISSING"], {}),
        ([], {"A_TOKEN": "x"}),
    ):
        with pytest.raises(UsageError):
            environment(names, plain, {"RUNPOD_API_KEY": "x"})
