"""Watching launches, against simulated platforms."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from job.cloud.api import KeyRefusedError
from job.cloud.launch_records import find_launch
from job.cloud.launching import Launcher
from job.cloud.provider import Terms
from job.cloud.watching import Watch
from job.errors import MachineError
from tests.fakes.cloud import RunPodServer, VastServer
from tests.fakes.cloud.helpers import COMMAND, IMAGE, command, launcher
from tests.fakes.fault_proxy import FaultProxy


def bidding(vast: VastServer, tmp_path: Path, said: list[str], url: str | None = None, **changes: Any) -> Launcher:
    starter = launcher(vast, tmp_path, said, url, **{"terms": Terms(interruptible=True), **changes})
    starter.rent()
    return starter


def once(said: list[str], part: str, act: Callable[[], None]) -> Callable[[str], None]:
    """Return a listener that also acts on the first message with this part."""
    pending = [act]

    def listen(text: str) -> None:
        said.append(text)
        if part in text and pending:
            pending.pop()()

    return listen


def test_an_outbid_instance_is_destroyed_and_replaced(vast: VastServer, tmp_path: Path) -> None:
    vast.add_ask(1)
    vast.add_ask(2)
    said: list[str] = []
    starter = bidding(vast, tmp_path, said)

    def vanish() -> None:
        del vast.instances[70002]  # between two polls: it has destroyed itself

    starter.say = once(said, "70001: running", lambda: vast.outbid(70001))
    done = once(said, "70002: running", vanish)
    starter.say = lambda text, first=starter.say: (first(text), done(text))[0]
    assert Watch(starter, relaunches=2).until_the_end() == "ended"
    assert vast.instances == {}
    creations = [body for body in vast.bodies if body and "image" in body]
    assert len(creations) == 2
    first, second = creations
    assert first["args"] == second["args"] == list(COMMAND)
    assert (first["label"], second["label"]) == ("abliterate-test-1", "abliterate-test-2")
    kept = find_launch(tmp_path / "launches", "abliterate-test", "vast")
    assert kept is not None
    assert [(rented.id, rented.why) for rented in kept.launch.instances] == [
        ("70001", "the instance was outbid"),
        ("70002", "gone"),
    ]


@pytest.mark.parametrize("reason", ["relaunches", "total", "checkpoint"])
def test_when_it_is_not_replaced(vast: VastServer, tmp_path: Path, reason: str) -> None:
    vast.add_ask(1)
    vast.add_ask(2)
    said: list[str] = []
    changes: dict[str, Any] = {"command": ("run", "model")} if reason == "checkpoint" else {}
    starter = bidding(vast, tmp_path, said, **changes)
    vast.outbid(70001)
    watch = Watch(
        starter, relaunches=0 if reason == "relaunches" else 3, most_dollars=0.0 if reason == "total" else None
    )
    assert watch.until_the_end() == "halted"
    assert list(vast.instances) == [70001]
    assert any("not replaced" in text and "bill" in text for text in said)


def test_a_silent_host_and_one_that_never_starts_are_replaced(vast: VastServer, tmp_path: Path) -> None:
    for number in (1, 2, 3):
        vast.add_ask(number)
    said: list[str] = []
    starter = bidding(vast, tmp_path, said)
    vast.instances[70001]["actual_status"] = "offline"
    never = once(said, "rented Vast.ai instance 70002", lambda: vast.instances[70002].update(actual_status="loading"))
    last = once(said, "70003: running", lambda: vast.instances.pop(70003))
    starter.say = lambda text: (never(text), last(text))[1]
    watch = Watch(starter, relaunches=3, lost_minutes=0.002, start_minutes=0.002)
    assert watch.until_the_end() == "ended"
    assert vast.instances == {}
    assert any("silent" in text for text in said)
    assert any("not started" in text for text in said)


def test_each_instance_has_its_own_time_to_start(vast: VastServer, tmp_path: Path) -> None:
    times: list[float] = []
    said: list[str] = []

    def rented(number: int) -> None:
        times.append(time.monotonic())
        vast.instances[number].update(actual_status="loading")

    for number in (1, 2, 3):
        vast.add_ask(number)
    starter = bidding(vast, tmp_path, said)
    rented(70001)
    second = once(said, "rented Vast.ai instance 70002", lambda: rented(70002))
    third = once(said, "rented Vast.ai instance 70003", lambda: rented(70003))
    starter.say = lambda text: (second(text), third(text))[1]
    watch = Watch(starter, relaunches=2, start_minutes=0.01)
    assert watch.until_the_end() == "halted"
    assert min(after - before for before, after in itertools.pairwise(times)) >= 0.5


def test_an_instance_that_cannot_be_destroyed_is_shouted_about(vast: VastServer, tmp_path: Path) -> None:
    vast.add_ask(1)
    vast.add_ask(2)
    said: list[str] = []
    starter = bidding(vast, tmp_path, said)
    vast.outbid(70001)
    broken = vast.fail("DELETE", status=500)
    mended = once(said, "it has ended by itself", vast.faults.clear)

    def vanish() -> None:
        del vast.instances[70002]
        threading.Timer(1.0, lambda: mended("it has ended by itself")).start()

    starter.say = once(said, "70002: running", vanish)
    assert Watch(starter, relaunches=1).until_the_end() == "ended"
    # The other machine did not wait for ever, and the watch did not leave before the first one was gone.
    assert vast.instances == {}
    assert broken.hits > 4
    assert any("70001 COULD NOT BE DESTROYED" in text and "console.vast.ai" in text for text in said)
    assert [(rented.why, rented.ending) for rented in starter.launch.instances] == [
        ("the instance was outbid", ""),
        ("gone", ""),
    ]


def test_a_platform_out_of_reach_is_waited_for(vast: VastServer, tmp_path: Path) -> None:
    vast.add_ask(1)
    said: list[str] = []
    with FaultProxy("127.0.0.1", vast.port) as line:
        starter = bidding(vast, tmp_path, said, line.url)
        line.refusing = True

        def back() -> None:
            line.refusing = False

        reached = once(said, "cannot be reached", back)
        ended = once(said, "70001: running", vast.instances.clear)
        starter.say = lambda text: (reached(text), ended(text))[1]
        assert Watch(starter).until_the_end() == "ended"


def test_a_key_that_is_revoked_ends_the_watch(vast: VastServer, tmp_path: Path) -> None:
    vast.add_ask(1)
    starter = bidding(vast, tmp_path, [])
    vast.keys.clear()
    with pytest.raises(KeyRefusedError):
        Watch(starter).until_the_end()


@pytest.mark.parametrize(("status", "code", "part"), [("exited", 1, "BILLS ON"), ("stopped", 0, "launch has ended")])
def test_how_a_watch_ends(vast: VastServer, tmp_path: Path, status: str, code: int, part: str) -> None:
    vast.add_ask(1)
    launched = command(
        vast, tmp_path, "launch", "--on", "4xRTX4090", "--image", IMAGE, "--env", "HF_TOKEN", "--", *COMMAND
    ).check()
    vast.instances[70001].update(actual_status=status, intended_status="stopped" if code == 0 else "running")
    result = command(vast, tmp_path, "watch", launched.out.strip(), "--every", "0.1")
    assert (result.code, part in result.err) == (code, True)


def test_an_instance_that_was_rented_and_not_recorded_is_taken_up(vast: VastServer, tmp_path: Path) -> None:
    starter = launcher(vast, tmp_path, [])
    with pytest.raises(MachineError):
        starter.rent()  # nothing is offered, but the record exists
    command(vast, tmp_path, "watch", "abliterate-test").fails(2, "has rented nothing")
    vast.add_instance(70001, label="abliterate-test-1", actual_status="exited")
    result = command(vast, tmp_path, "watch", "abliterate-test", "--every", "0.1")
    assert (result.code, "70001 BILLS ON" in result.err) == (1, True)
    # The same for the second one, of a watch that was killed while it replaced the first.
    vast.instances.clear()
    vast.add_instance(70002, label="abliterate-test-2", actual_status="exited")
    result = command(vast, tmp_path, "watch", "abliterate-test", "--every", "0.1")
    assert "70002 BILLS ON" in result.err


def test_watching_what_somebody_else_launched(vast: VastServer, tmp_path: Path) -> None:
    vast.add_instance(5)
    result = command(vast, tmp_path, "watch", "5").check()
    assert result.out.startswith("5: running")
    assert "no record" in result.err


def test_launch_and_watch_on_runpod(runpod: RunPodServer, tmp_path: Path) -> None:
    threading.Timer(2.5, runpod.pods.clear).start()
    command(
        runpod, tmp_path, "launch", "--on", "1xRTX4090", "--image", IMAGE, "--watch", "--every", "0.1", "--", *COMMAND
    ).check()
    assert len(runpod.asked("POST", "/v2/pods")) == 1
