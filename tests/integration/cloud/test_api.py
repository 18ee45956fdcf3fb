"""Interpreting instance states: no unknown state may pass for an end."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from job.cloud import api
from job.cloud.api import CloudError
from job.cloud.credentials import open_market
from job.cloud.provider import Instance, Order, Terms
from job.cloud.runpod import _instance as pod
from job.cloud.runpod import _offer as pod_offer
from job.cloud.vast import _instance as vast_instance
from job.cloud.vast import _offer as vast_offer
from tests.fakes.cloud import RunPodServer, VastServer
from tests.fakes.cloud.helpers import QUICK, env_of, need

# By the platforms' documentation.
POD_STATUSES = {
    "PROVISIONING": "starting",
    "STARTING": "starting",
    "RUNNING": "running",
    "EXITED": "stopped",
    "ERROR": "lost",
    "TERMINATED": "gone",
}
ACTUAL = {
    "created": "starting",
    "loading": "starting",
    "rebooting": "starting",
    "running": "running",
    "frozen": "running",
    "stopped": "outbid",
    "exited": "exited",
    "offline": "lost",
    "unknown": "unknown",
    None: "unknown",
}
CONTRACT = ("running", "stopped", "unloaded")
WANTED = ("running", "stopped", "frozen")
ENDS = {"outbid", "stopped", "exited", "lost", "gone"}
ODD: list[Any] = ["", "paused", "DEAD", "scheduling", "terminating", " running?", 7, [], {}, True]


def row(actual: Any, contract: Any = "running", wanted: Any = "running") -> Instance:
    return vast_instance({"id": 1, "actual_status": actual, "cur_state": contract, "intended_status": wanted})


@pytest.mark.parametrize("status", POD_STATUSES)
def test_every_documented_status_of_a_pod(status: str) -> None:
    for written in (status, status.lower()):
        assert pod({"id": "a", "status": written}).state == POD_STATUSES[status]


@pytest.mark.parametrize("status", [*ODD, None, "CREATED", "RESTARTING", "PAUSED", "DEAD"])
def test_every_other_status_of_a_pod_is_unknown(status: Any) -> None:
    assert pod({"id": "a", "status": status}).state == "unknown"
    assert pod({"id": "a"}).state == "unknown"


@pytest.mark.parametrize("actual", ACTUAL)
def test_every_documented_status_of_an_instance(actual: str | None) -> None:
    assert row(actual).state == ACTUAL[actual]


def test_every_combination_of_documented_values() -> None:
    for actual, contract, wanted in itertools.product(ACTUAL, CONTRACT, WANTED):
        state = row(actual, contract, wanted).state
        if wanted == "stopped":
            expected = "stopped"
        elif contract == "unloaded":
            working = actual in ("running", "frozen", "loading", "rebooting")
            expected = "unknown" if working else "gone"
        elif contract == "stopped":
            # A container that runs without a contract, or reports nothing, is contradictory: half of the answer is
            # stale.
            expected = "unknown" if actual in ("running", "frozen", "unknown", None) else "outbid"
        else:
            expected = ACTUAL[actual]
        assert state == expected, (actual, contract, wanted)


@pytest.mark.parametrize("odd", [*ODD, None])
def test_an_undocumented_value_is_no_end(odd: Any) -> None:
    assert row(odd).state == "unknown"
    for actual in ACTUAL:
        assert row(actual, odd).state == "unknown"
        assert row(actual, "stopped", odd).state == "unknown"
    missing = {"id": 1, "actual_status": "exited", "cur_state": "stopped", "intended_status": "running"}
    for name in ("actual_status", "cur_state", "intended_status"):
        assert vast_instance({key: value for key, value in missing.items() if key != name}).state == "unknown"


@given(st.text(max_size=12), st.text(max_size=12), st.text(max_size=12))
def test_whatever_text_comes_only_documented_ends_are_ends(actual: str, contract: str, wanted: str) -> None:
    if row(actual, contract, wanted).state in ENDS:
        assert wanted == "stopped" or {contract, wanted} <= {*CONTRACT, *WANTED}
    if pod({"id": "a", "status": actual}).state in ENDS:
        assert actual.upper() in POD_STATUSES


@pytest.mark.parametrize("answer", ["{}", "[]", "null", '{"instances": 3}', '{"id": "abc"}', '"x"', '{"status": null}'])
def test_an_answer_of_another_form_is_no_end(
    vast: VastServer, runpod: RunPodServer, answer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.fakes.hub.server import Reply

    reply = Reply(200, {"Content-Type": "application/json"}, answer.encode())
    for server, platform in ((vast, "vast"), (runpod, "runpod")):
        monkeypatch.setattr(server, "answer", lambda _call, _body: reply)
        market = open_market(platform, print, env=env_of(server), patience=QUICK)  # type: ignore[arg-type]
        assert market.instance("5").state == "unknown"
        assert market.instance("5").id == "5"


def test_the_list_of_instances_is_read_to_its_end(vast: VastServer) -> None:
    for number in range(1, 61):
        vast.add_instance(number)
    market = open_market("vast", print, env=env_of(vast), patience=QUICK)
    assert [int(instance.id) for instance in market.instances()] == list(range(1, 61))


def test_a_list_that_is_none_is_not_an_empty_one(
    vast: VastServer, runpod: RunPodServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    from job.cloud.api import CloudError
    from tests.fakes.hub.server import Reply

    for server, platform in ((vast, "vast"), (runpod, "runpod")):
        for body in (b"{}", b"[]", b"null", b'{"instances": null, "pods": null}'):
            reply = Reply(200, {"Content-Type": "application/json"}, body)
            monkeypatch.setattr(server, "answer", lambda _call, _body, reply=reply: reply)
            market = open_market(platform, print, env=env_of(server), patience=QUICK)  # type: ignore[arg-type]
            with pytest.raises(CloudError, match="not a list"):
                market.instances()


HOSTILE_IDS: list[Any] = ["../../users/me", "1/../2", "1; rm -rf ~", "a b", "\x1b[2J", "", {}, [1], "9" * 200, "a\n"]


@pytest.mark.parametrize("id", HOSTILE_IDS, ids=repr)
def test_an_id_that_is_none_gets_into_no_url_file_or_command(
    vast: VastServer, runpod: RunPodServer, tmp_path: Path, id: Any
) -> None:
    vast.add_ask(1)
    vast.say("PUT", "/api/v0/asks/1/", json.dumps({"success": True, "new_contract": id}))
    market = open_market("vast", print, env=env_of(vast), patience=QUICK)
    (offer,) = market.offers(need(), Terms())
    with pytest.raises(CloudError, match="names no instance") as refused:
        market.rent(offer, Order(label="a-1", image="i", command=("run",)), {})
    assert refused.value.uncertain
    vast.say("GET", "/api/v1/instances/", json.dumps({"instances": [{"id": id}, {"id": 7}]}))
    assert [instance.id for instance in market.instances()] == ["7"]
    pods = open_market("runpod", print, env=env_of(runpod), patience=QUICK)
    runpod.say("GET", "/v2/pods", json.dumps({"pods": [{"id": id}, {"id": "p7"}]}))
    assert [instance.id for instance in pods.instances()] == ["p7"]


@pytest.mark.parametrize("odd", ["much", None, [], {}, True, "NaN", 1e999, -1e999, float("nan"), 10**400], ids=repr)
def test_a_price_that_is_no_number_is_unknown_and_no_offer(odd: Any) -> None:
    """Regression: an instance's odd price ended the watch with a traceback while the machine billed on."""
    assert vast_instance({"id": 1, "dph_total": odd}).dollars is None
    assert pod({"id": "a", "cost": odd}).dollars is None
    assert vast_offer({"id": 1, "dph_total": odd}, need(), Terms()) is None
    assert pod_offer({"id": "a", "price": {"secure": odd}}, need(), "SECURE") is None
    assert pod_offer({"id": "a", "price": odd}, need(), "SECURE") is None
    sound = {"id": 1, "dph_total": "1.5", "inet_down": odd, "inet_up_cost": odd, "reliability2": odd}
    found = vast_offer(sound, need(), Terms())
    assert found is not None
    assert (found.dollars, found.down, found.up_dollars, found.reliability) == (1.5, None, 0.0, None)


@pytest.mark.parametrize(
    ("status", "body", "said"),
    [
        (500, {"errors": 5}, "answers 500"),
        (400, {"errors": {"a": 1}, "msg": "\x1b]0;mine\x07no"}, "no"),
        (200, "[" * 200_000, "no JSON"),
        (200, {"instances": {"7": {}}}, "not a list"),
        (200, [], "not a list"),
    ],
    ids=str,
)
def test_an_odd_response_is_a_failure_of_the_platform(vast: VastServer, status: int, body: Any, said: str) -> None:
    """Regression: each ended the launcher with a traceback."""
    data = body if isinstance(body, str) else json.dumps(body)
    vast.say("GET", "/api/v1/instances/", data, status=status)
    market = open_market("vast", print, env=env_of(vast), patience=QUICK)
    with pytest.raises(CloudError, match=said) as failed:
        market.instances()
    assert str(failed.value).isprintable()


def test_a_response_without_end_is_cut_off(vast: VastServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "_MOST_BYTES", 1 << 20)
    vast.say("GET", "/api/v1/instances/", " " * (3 << 20))
    market = open_market("vast", print, env=env_of(vast), patience=QUICK)
    with pytest.raises(CloudError, match="does not end"):
        market.instances()
