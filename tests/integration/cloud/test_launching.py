"""Launching, against simulated platforms."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from job.cloud.api import CloudError, KeyRefusedError, NoMoneyError
from job.cloud.launch_records import find_launch
from job.cloud.provider import MARKER, Terms
from job.errors import MachineError
from job.preflight.gpu_table import MIN_CUDA
from tests.fakes.cloud import RunPodServer, VastServer
from tests.fakes.cloud.helpers import COMMAND, IMAGE, TOKEN, command, launcher, need
from tests.fakes.fault_proxy import FaultProxy


def test_launch_on_vast(vast: VastServer, tmp_path: Path) -> None:
    vast.add_ask(1)
    result = command(
        vast, tmp_path, "launch", "--on", "4xRTX4090", "--image", IMAGE, "--env", "HF_TOKEN", "--env", "X=1",
        "--", "abliterate", *COMMAND, "--upload", "hf://user/model",
    ).check()  # fmt: skip
    (body,) = [body for body in vast.bodies if body and "image" in body]
    assert body["runtype"] == "args"
    assert body["args"] == [*COMMAND, "--upload", "hf://user/model"]
    label = result.out.strip()
    assert body["label"] == f"{label}-1"
    assert body["env"] == {"HF_TOKEN": TOKEN, "X": "1", MARKER: f"{label}-1"}
    assert body["disk"] == 200
    assert "price" not in body
    assert "rented Vast.ai instance 70001" in result.err
    found = find_launch(tmp_path / "launches", "70001", "vast")
    assert found is not None
    assert (found.launch.label, found.launch.env, found.launch.plain_env) == (label, ("HF_TOKEN",), {"X": "1"})


def test_launch_on_runpod(runpod: RunPodServer, tmp_path: Path) -> None:
    command(
        runpod, tmp_path, "launch", "--on", "1xRTX4090", "--disk", "90", "--image", IMAGE, "--env", "HF_TOKEN",
        "--", *COMMAND, "--set", "good_prompts.prefix=a b",
    ).check()  # fmt: skip
    (body,) = [body for body in runpod.bodies if body]
    assert body["gpu"] == {"id": "NVIDIA GeForce RTX 4090", "count": 1, "minCudaVersion": MIN_CUDA}
    assert body["mounts"] == {"persistent": {"size": 90, "path": "/workspace"}}
    assert body["args"].endswith("--set 'good_prompts.prefix=a b'")
    assert body["env"] == {"HF_TOKEN": TOKEN, MARKER: body["name"]}
    assert body["cloud"] == "SECURE"
    command(
        runpod, tmp_path, "launch", "--on", "1xRTX4090", "--image", IMAGE, "--volume", "vol1", "--", *COMMAND
    ).check()
    assert runpod.bodies[-1]["mounts"] == {"network": [{"volumeId": "vol1", "path": "/workspace"}]}


def test_what_launch_refuses_and_warns_of(vast: VastServer, tmp_path: Path) -> None:
    vast.add_ask(1)
    start = ("launch", "--on", "4xRTX4090")
    command(vast, tmp_path, *start, "--", *COMMAND).fails(2, "no image", "OWNER")
    command(vast, tmp_path, *start, "--image", "ghcr.io/OWNER/job:1", "--", *COMMAND).fails(2, "no image")
    ready = (*start, "--image", IMAGE)
    command(vast, tmp_path, *ready, "--bid", "1", "--", "run", "model").fails(2, "no --checkpoint")
    command(vast, tmp_path, *ready, "--env", "VAST_API_KEY", "--", *COMMAND).fails(2, "whole account")
    command(vast, tmp_path, *ready, "--env", "MY_TOKEN=abc", "--", *COMMAND).fails(2, "MY_TOKEN", "command line")
    command(vast, tmp_path, *ready, "--env", "NOT_SET", "--", *COMMAND).fails(2, "NOT_SET")
    command(vast, tmp_path, *ready, "--", "abliterate").fails(2, "no command to run")
    assert vast.instances == {}
    assert vast.asked("PUT") == []
    warned = command(vast, tmp_path, *ready, "--", "run", "model").check().err
    for part in ("no --when-done", "no --upload", "HF_TOKEN is set here"):
        assert part in warned


def test_a_dry_run_shows_the_offer_that_a_launch_would_rent_and_rents_nothing(vast: VastServer, tmp_path: Path) -> None:
    start = ("launch", "--on", "4xRTX4090", "--image", IMAGE, "--env", "HF_TOKEN", "--env", "NOTE=plain")
    words = ("--", "run", "a model", "--upload", "hf://user/model")
    command(vast, tmp_path, *start, "--dry-run", *words).fails(76, "no machine is offered")
    vast.add_ask(1)
    shown = command(vast, tmp_path, *start, "--dry-run", *words).check()
    assert vast.instances == {}
    assert vast.asked("PUT") == []
    assert not (tmp_path / "launches").exists()
    offer, *rest = shown.out.splitlines()
    assert rest == [
        f"image: {IMAGE}",
        "command: abliterate run 'a model' --upload hf://user/model",
        "variables: HF_TOKEN, NOTE",
    ]
    assert TOKEN not in shown.out + shown.err
    assert "no --when-done" in shown.err
    rented = command(vast, tmp_path, *start, *words).check().err
    assert offer.removeprefix("would rent ").split(":")[0] == "1"
    assert len(vast.instances) == 1
    assert "rented Vast.ai instance" in rented


def test_a_taken_offer_gives_way_to_the_next(vast: VastServer, tmp_path: Path) -> None:
    vast.add_ask(1, dph_total=1.0)
    vast.add_ask(2, dph_total=1.1)
    vast.fail("PUT", "/api/v0/asks/1/", status=410, message="no longer available")
    said: list[str] = []
    assert launcher(vast, tmp_path, said).rent() == "70001"
    assert "offer 1 is taken" in said
    assert list(vast.asks) == [1]


def test_a_bid_is_made_above_the_lowest(vast: VastServer, tmp_path: Path) -> None:
    vast.add_ask(1, min_bid=0.8)
    starter = launcher(vast, tmp_path, [], terms=Terms(interruptible=True))
    starter.rent()
    (body,) = [body for body in vast.bodies if body and "price" in body]
    assert body["price"] == pytest.approx(0.88)
    vast.add_ask(2, min_bid=0.8)
    starter = launcher(vast, tmp_path, [], terms=Terms(interruptible=True, bid=1.3))
    starter.rent()
    assert vast.bodies[-1]["price"] == 1.3


def test_nothing_to_rent(vast: VastServer, tmp_path: Path) -> None:
    with pytest.raises(MachineError, match="no machine is offered"):
        launcher(vast, tmp_path, []).rent()


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        ({"status": 402, "message": "Insufficient balance"}, NoMoneyError),
        ({"status": 403, "message": "insufficient_credit"}, NoMoneyError),
        ({"status": 401, "message": "no"}, KeyRefusedError),
        ({"status": 422, "message": f"env HF_TOKEN={TOKEN} is bad"}, CloudError),
    ],
)
def test_refusals_end_the_launch(vast: VastServer, tmp_path: Path, fault: dict[str, Any], error: type) -> None:
    vast.add_ask(1)
    vast.add_ask(2)
    rule = vast.fail("PUT", "/api/v0/asks/*", **fault)
    with pytest.raises(error) as caught:
        launcher(vast, tmp_path, []).rent()
    assert rule.hits == 1
    assert TOKEN not in str(caught.value)


def test_an_unconfirmed_creation_is_looked_for_and_not_repeated(vast: VastServer, tmp_path: Path) -> None:
    vast.add_ask(1)
    vast.add_ask(2)
    vast.drop("PUT", "/api/v0/asks/*")
    said: list[str] = []
    starter = launcher(vast, tmp_path, said)
    assert starter.rent() == "70001"
    assert len(vast.instances) == 1
    assert any("checking whether the machine was rented" in text for text in said)


def test_an_unconfirmed_creation_that_did_not_happen(vast: VastServer, tmp_path: Path) -> None:
    vast.add_ask(1, dph_total=1.0)
    vast.add_ask(2, dph_total=1.1)
    vast.fail("PUT", "/api/v0/asks/1/", status=502)
    assert launcher(vast, tmp_path, []).rent() == "70001"
    assert list(vast.asks) == [1]


def test_an_unconfirmed_pod_is_found_by_its_name(runpod: RunPodServer, tmp_path: Path) -> None:
    runpod.drop("POST", "/v2/pods")
    assert launcher(runpod, tmp_path, [], needs=(need("1xRTX4090"),)).rent() == "pod1"
    assert len(runpod.pods) == 1


def test_a_catalogue_may_be_out_of_date(runpod: RunPodServer, tmp_path: Path) -> None:
    runpod.fail("POST", "/v2/pods", status=400, message="There are no longer any instances available")
    with pytest.raises(MachineError, match="no machine is offered"):
        launcher(runpod, tmp_path, [], needs=(need("1xRTX4090"),)).rent()
    runpod.faults.clear()
    runpod.fail("POST", "/v2/pods", status=400, message="disk must be positive")
    with pytest.raises(CloudError, match="disk must be positive"):
        launcher(runpod, tmp_path, [], needs=(need("1xRTX4090"),)).rent()


@pytest.mark.parametrize("fault", ["429", "503", "cut"])
def test_a_bad_line_and_a_busy_platform(vast: VastServer, tmp_path: Path, fault: str) -> None:
    vast.add_ask(1)
    if fault != "cut":
        vast.fail(status=int(fault), headers={"Retry-After": "0"}, times=2)
    said: list[str] = []
    with FaultProxy("127.0.0.1", vast.port, cut_up=[10] if fault == "cut" else []) as line:
        assert launcher(vast, tmp_path, said, line.url).rent() == "70001"
    assert any("trying again" in text for text in said)


def test_a_platform_that_asks_for_hours_is_not_waited_for(vast: VastServer, tmp_path: Path) -> None:
    vast.fail(status=429, headers={"Retry-After": "7200"})
    begin = time.monotonic()
    with pytest.raises(CloudError, match="429"):
        launcher(vast, tmp_path, []).rent()
    assert time.monotonic() - begin < 5


def test_a_machine_that_was_there_before_is_never_taken_for_the_rented_one(vast: VastServer, tmp_path: Path) -> None:
    """Regression: a stale response named another instance of the account, which the launch then destroyed."""
    vast.add_ask(1)
    vast.add_instance(4242, label="somebody's work")
    vast.say("PUT", "/api/v0/asks/1/", '{"success": true, "new_contract": 4242}')
    said: list[str] = []
    starter = launcher(vast, tmp_path, said)
    with pytest.raises(MachineError, match="no machine is offered"):
        starter.rent()
    assert "names instance 4242, which is not new" in said[0]
    assert not starter.launch.instances
    assert 4242 in vast.instances
