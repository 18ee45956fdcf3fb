"""The lease of a mirror: one runner at a time, despite kills, stops and disconnections."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path
from random import Random
from typing import Any

import pytest

from job.config.load import load_settings
from job.errors import DeliveryError, HeldError, JobError, MachineError, Stopped
from job.lifecycle.lock import held
from job.mirror import SnapshotPace, s3_store
from job.mirror.snapshot import check_study
from job.storage.events import Events
from job.storage.run_folder import RunFolder
from job.system.signals import StopSignals
from job.transfer.folders import target_folder
from tests.fakes.fault_proxy import FaultProxy
from tests.fakes.s3_server import Answer, Request
from tests.mirror_places import file_place, hub_place, place, running, s3_options, s3_place
from tests.mirrors import (
    CALM,
    IDENTITY,
    JOB,
    QUICK,
    Place,
    add_trial,
    mirrored,
    read_tree,
    trials_in,
    wait_until,
    write_folder,
)

__all__ = ["file_place", "hub_place", "place", "running", "s3_place"]

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

# A run whose heartbeats are rare compared to the test's actions.
SLOW = SnapshotPace(beat_s=0.5, expiry_s=1.0, snapshot_s=0.02, poll_s=0.1)
# Where nothing has to give signs of life in time: a lease that is soon over.
BRIEF = SnapshotPace(beat_s=0.2, expiry_s=0.6, snapshot_s=0.02, poll_s=0.05)


def line(process: subprocess.Popen[str], start: str) -> str:
    """Return the next line of a run with this beginning."""
    assert process.stdout is not None
    for text in process.stdout:
        if text.startswith(start):
            return text
    raise AssertionError(f"{process.wait()}: {process.stderr.read() if process.stderr else ''}")


def end(process: subprocess.Popen[str]) -> int:
    process.communicate(timeout=30)
    return process.returncode


def kill(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


@pytest.mark.full("kills")
@pytest.mark.parametrize(("place", "kills"), [("file", 5), ("s3", 3), ("hub", 2)], indirect=["place"])
def test_what_a_killed_run_has_mirrored_is_whole(place: Place, tmp_path: Path, kills: int) -> None:
    random, workspace = Random(kills), tmp_path / "0" / JOB
    acknowledged = 0
    for number in range(kills):
        process = place.start("work", workspace, large=3_000_000, ballast=300_000)
        line(process, "generation" if number else "generation 1")
        time.sleep(random.uniform(0, 0.5))
        process.kill()
        rest, _ = process.communicate()
        whole = rest.rpartition("\n")[0]  # the kill may cut a line
        seen = [int(text.split()[1]) for text in whole.splitlines() if text.startswith("generation")]
        acknowledged = max([acknowledged, *seen])
        assert place.head()["generation"] >= acknowledged
        # Study, state and events are consistent, on an empty machine.
        fresh = RunFolder(tmp_path / f"fresh-{number}" / JOB)
        place.claim(fresh.path).close(final=False)
        if place.head()["generation"]:
            _consistent(fresh, place)
        if number % 2:
            workspace = fresh.path  # the next one continues there
    assert acknowledged > 0


def _consistent(run: RunFolder, place: Place) -> None:
    files = place.head()["files"]
    assert mirrored(run.path).keys() == files.keys()
    done = 0
    if run.state_file.exists():
        done = int(run.state_file.read_text().partition(":")[2].strip(" }\n"))
    if "study.db" in files:
        check_study(run.study_file)
        trials = trials_in(run.study_file)
        assert [number for number, _ in trials] == list(range(len(trials)))
        assert all(count == 5 for _, count in trials)
        assert done <= len(trials)


@pytest.mark.parametrize(("place", "rounds"), [("file", 8), ("s3", 6), ("hub", 4)], indirect=["place"])
def test_of_those_who_claim_at_once_one_wins(place: Place, tmp_path: Path, rounds: int) -> None:
    racers = [place.start("race", tmp_path / "race", rounds=rounds) for _ in range(3)]
    (tmp_path / "race").mkdir()
    if place.kind == "hf":
        place.mirror()._store.prepare()
    results = []
    for number in range(rounds):
        for racer in racers:
            line(racer, "ready")
        (tmp_path / "race" / f"go-{number}").touch()
        results.append(sorted(_result(racer) for racer in racers))
    for racer in racers:
        kill(racer)
    assert results == [["HeldError", "HeldError", "won"]] * rounds


def _result(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def test_a_dead_run_is_followed_at_once(place: Place, tmp_path: Path) -> None:
    process = place.start("work", tmp_path / "a" / JOB)
    line(process, "generation 1")
    with pytest.raises(HeldError, match=f"process {process.pid}"):
        place.claim(tmp_path / "b" / JOB)
    kill(process)
    begun = time.monotonic()
    place.claim(tmp_path / "b" / JOB).close(final=False)
    assert time.monotonic() - begun < 5


def test_a_silent_run_elsewhere_is_followed_when_its_lease_has_expired(place: Place, tmp_path: Path) -> None:
    process = place.start("claim", tmp_path / "a" / JOB, BRIEF, elsewhere=True)
    line(process, "claimed")
    kill(process)
    said: list[str] = []
    begun = time.monotonic()
    claim = place.claim(tmp_path / "b" / JOB, BRIEF, said)
    assert time.monotonic() - begun > BRIEF.expiry_s / 2
    assert any("waiting for its lease to expire" in text for text in said)
    claim.close(final=False)
    if place.kind != "file":
        return
    # Long dead: by the server's own clock, without another wait.
    process = place.start("claim", tmp_path / "a" / JOB, QUICK, elsewhere=True)
    line(process, "claimed")
    kill(process)
    head = target_folder(place.uri) / JOB / "head.json"
    long_ago = head.stat().st_mtime - QUICK.expiry_s - 2.1
    os.utime(head, (long_ago, long_ago))
    said.clear()
    place.claim(tmp_path / "c" / JOB, QUICK, said).close(final=False)
    assert not any("waiting" in text for text in said)


def test_the_age_of_a_head_is_the_servers_word(s3_place: Place, tmp_path: Path) -> None:
    s3_place.claim(tmp_path / JOB).close()
    store = s3_place.mirror()._store
    stored = store.read(JOB)
    assert 0 <= stored.age_s <= 2
    s3_place.server.written_earlier(f"mirrors/{JOB}/head.json", seconds=3)
    assert 1 < store.read(JOB).age_s <= 5


def test_a_run_elsewhere_that_gives_signs_of_life_is_left_alone(place: Place, tmp_path: Path) -> None:
    process = place.start("claim", tmp_path / "a" / JOB, QUICK, elsewhere=True)
    line(process, "claimed")
    for _ in range(2):
        with pytest.raises(HeldError, match=f"process {process.pid}"):
            place.claim(tmp_path / "b" / JOB, QUICK)
    assert end(process) == 0  # its input is closed: it ends and releases the lease
    begun = time.monotonic()
    place.claim(tmp_path / "b" / JOB, CALM).close(final=False)
    assert time.monotonic() - begun < 5


def test_a_run_that_was_overtaken_in_its_sleep_writes_nothing_more(place: Place, tmp_path: Path) -> None:
    process = place.start("work", tmp_path / "a" / JOB, SLOW, elsewhere=True)
    line(process, "generation 1")
    process.send_signal(signal.SIGSTOP)
    claim = place.claim(tmp_path / "b" / JOB, SLOW)
    claim.start()
    add_trial(RunFolder(tmp_path / "b" / JOB).study_file, 1_000)
    claim.request()
    generation = claim.head.generation
    wait_until(lambda: claim.head.generation > generation, "no snapshot")
    process.send_signal(signal.SIGCONT)
    assert "has taken it over" in line(process, "LeaseLostError")
    assert end(process) == HeldError.exit_code
    head = place.head()
    assert head["lease"]["process"]["pid"] == os.getpid()
    assert head["generation"] == generation + 1
    claim.check()
    assert claim.close()
    place.claim(tmp_path / "c" / JOB).close(final=False)
    assert trials_in(tmp_path / "c" / JOB / "study.db")[-1] == (1_000, 5)


def test_the_main_thread_is_told_in_the_middle_of_its_work(file_place: Place, tmp_path: Path) -> None:
    told: list[JobError] = []
    claim = file_place.claim(write_folder(tmp_path / JOB).path, QUICK)
    claim.start(told.append)
    file_place.change_head(runner="0" * 32)
    wait_until(lambda: told, "not told")
    assert isinstance(told[0], HeldError)
    with pytest.raises(HeldError, match="has taken it over"):
        claim.check()
    before = file_place.contents()
    claim.request()
    assert not claim.close()
    assert file_place.contents() == before
    assert len(told) == 1


def test_a_mirror_that_is_removed_is_not_made_again(file_place: Place, tmp_path: Path) -> None:
    claim = file_place.claim(tmp_path / JOB, QUICK)
    claim.start()
    file_place.put(f"{JOB}/head.json", None)

    def lost() -> bool:
        try:
            claim.check()
        except HeldError as error:
            return "has been removed" in str(error)
        return False

    wait_until(lost, "not noticed")
    assert not claim.close()


def _line_to(place: Place) -> FaultProxy:
    return FaultProxy("127.0.0.1", place.server.port)


def test_a_mirror_that_is_down_is_said_and_made_up_for(s3_place: Place, tmp_path: Path) -> None:
    run = write_folder(tmp_path / JOB)
    said: list[str] = []
    told: list[JobError] = []
    with _line_to(s3_place) as proxy:
        s3_place.s3 = s3_options(proxy.url)
        claim = s3_place.claim(run.path, QUICK, said)
        claim.start(told.append)
        proxy.refusing = True
        proxy.cut_now()
        for number in range(3, 23):
            begun = time.monotonic()
            add_trial(run.study_file, number)
            claim.request()
            claim.check()
            assert time.monotonic() - begun < 0.5  # no run waits for a mirror
            time.sleep(0.1)
        # It has been unreachable for longer than the lease: no more publicly visible actions.
        with pytest.raises(HeldError, match="could not be renewed"), claim.outward():
            raise AssertionError("never reached")
        assert sum("warning" in text for text in said) >= 2
        assert told == []
        proxy.refusing = False
        generation = claim.head.generation
        wait_until(lambda: claim.head.generation > generation, "not made up for")
        with claim.outward():
            claim.check()
        wait_until(lambda: any("works again" in text for text in said), "not said")
        assert claim.close()
    assert s3_place.head()["lease"]["released"]
    s3_place.s3 = s3_options(s3_place.server.url)
    s3_place.claim(tmp_path / "b" / JOB).close(final=False)
    assert len(trials_in(tmp_path / "b" / JOB / "study.db")) == 23


def test_a_required_mirror_that_stays_down_stops_the_job(s3_place: Place, tmp_path: Path) -> None:
    told: list[JobError] = []
    claim = s3_place.claim(write_folder(tmp_path / JOB).path, BRIEF, required=True)
    claim.start(told.append)
    s3_place.server.front.rules.append(lambda *_: Answer("503 Service Unavailable", "SlowDown"))
    claim.request()
    wait_until(lambda: told, "not told")
    assert isinstance(told[0], DeliveryError)
    assert told[0].exit_code == 6
    with pytest.raises(DeliveryError, match="has been unreachable for"):
        claim.check()
    begun = time.monotonic()
    assert not claim.close(seconds=1.0)
    assert time.monotonic() - begun < 3


def test_an_upload_in_the_way_of_a_cut_line_is_interrupted(s3_place: Place, tmp_path: Path) -> None:
    told: list[JobError] = []
    with _line_to(s3_place) as proxy:
        s3_place.s3 = s3_options(proxy.url)
        claim = s3_place.claim(tmp_path / JOB, BRIEF)
        claim.start(told.append)
        with claim.outward():
            proxy.refusing = True
            proxy.cut_now()
            wait_until(lambda: told, "not told")
        assert isinstance(told[0], HeldError)
        assert "could not be renewed" in str(told[0])
        claim.close(seconds=0.5)


def test_a_sign_of_life_that_waits_for_the_last_word_does_not_take_it_back(file_place: Place, tmp_path: Path) -> None:
    restless = SnapshotPace(beat_s=0.0005, expiry_s=60.0, snapshot_s=0.02, poll_s=0.1)
    for number in range(20):
        claim = file_place.claim(write_folder(tmp_path / str(number) / JOB).path, restless)
        claim.start()
        assert claim.close()
        assert file_place.head()["lease"]["released"]


def test_a_hub_that_fails_for_a_while_is_made_up_for(hub_place: Place, tmp_path: Path) -> None:
    said: list[str] = []
    claim = hub_place.claim(write_folder(tmp_path / JOB).path, CALM, said)
    claim.start()
    rule = hub_place.server.fail("POST", "/api/models/cook/mirror/commit/main", times=7)
    claim.request()
    wait_until(lambda: claim.head.generation == 1, "not made up for")
    assert rule.hits == 7
    assert any("503" in text for text in said)
    assert claim.close()


@pytest.mark.parametrize("place", ["s3", "hub"], indirect=True)
def test_an_answer_that_gets_lost_is_no_lost_lease(place: Place, tmp_path: Path) -> None:
    run = write_folder(tmp_path / JOB)
    claim = place.claim(run.path)
    claim.start()
    for number in (3, 4):
        if place.kind == "hf":
            place.server.drop("POST", "/api/models/cook/mirror/commit/main")
        else:
            place.server.front.rules.append(_once(_is_head_put, _answer_lost))
        generation = claim.head.generation
        add_trial(run.study_file, number)
        claim.request()
        wait_until(lambda before=generation: claim.head.generation > before, "no snapshot")
        claim.check()
    assert claim.close()
    fresh = tmp_path / "b" / JOB
    place.claim(fresh).close(final=False)
    assert mirrored(fresh) == mirrored(run.path)


def _is_head_put(request: Request) -> bool:
    return request.operation == "PUT" and request.key.endswith("head.json")


def _answer_lost() -> Answer:
    return Answer("503 Service Unavailable", "SlowDown", passed_on=True)


def _once(matches: Any, answer: Any) -> Any:
    left = [1]

    def rule(request: Request, _environ: dict[str, Any]) -> Answer | None:
        if left and matches(request):
            left.clear()
            return answer()  # type: ignore[no-any-return]
        return None

    return rule


def test_lines_cut_anywhere_lose_nothing(s3_place: Place, tmp_path: Path) -> None:
    run = write_folder(tmp_path / JOB, large=100_000)
    cuts = range(60_000, 3_000_000, 300_000)
    with FaultProxy("127.0.0.1", s3_place.server.port, cut_up=cuts, cut_down=range(9_000, 200_000, 7_000)) as proxy:
        s3_place.s3 = s3_options(proxy.url)
        said: list[str] = []
        claim = s3_place.claim(run.path, said=said)
        claim.start()
        for number in range(3, 8):
            generation = claim.head.generation
            add_trial(run.study_file, number)
            (run.path / "residuals" / f"bad-{number}.safetensors").write_bytes(Random(number).randbytes(100_000))
            claim.request()
            wait_until(lambda before=generation: claim.head.generation > before, "no snapshot")
            claim.check()
        assert claim.close(), said
        assert proxy.cuts > 5
    s3_place.s3 = s3_options(s3_place.server.url)
    place = s3_place
    place.claim(tmp_path / "b" / JOB).close(final=False)
    assert mirrored(tmp_path / "b" / JOB) == mirrored(run.path)


def test_a_long_upload_does_not_cost_the_lease(s3_place: Place, tmp_path: Path) -> None:
    run = write_folder(tmp_path / JOB, large=3_000_000)
    with FaultProxy("127.0.0.1", s3_place.server.port, bytes_per_s=1_000_000) as proxy:
        s3_place.s3 = s3_options(proxy.url)
        claim = s3_place.claim(run.path, SnapshotPace(beat_s=0.5, expiry_s=1.5, snapshot_s=0.02, poll_s=0.1))
        claim.start()
        claim.request()
        with claim.outward():
            while claim.head.generation == 0:
                claim.check()
                time.sleep(0.02)
        assert claim.head.lease.beat > 1
        assert claim.close()


def test_a_server_that_ignores_conditions_is_noticed(
    s3_place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3_store, "_SETTLE_S", 0.1)  # another's write is visible at once here

    def ignore(_request: Request, environ: dict[str, Any]) -> None:
        environ.pop("HTTP_IF_MATCH", None)
        environ.pop("HTTP_IF_NONE_MATCH", None)

    s3_place.server.front.rules.append(ignore)
    with s3_place.mirror() as mirror:
        proof = mirror.probe()
    assert not proof.fenced
    assert "ignores conditional requests" in proof.quirks[0]
    run = write_folder(tmp_path / JOB)
    claim = s3_place.claim(run.path, QUICK)
    claim.start()
    claim.request()
    wait_until(lambda: claim.head.generation == 1, "no snapshot")
    with pytest.raises(HeldError):
        s3_place.claim(tmp_path / "b" / JOB)
    other = "0" * 32

    def lost() -> bool:
        # Again where this run's sign of life was written over it: without conditions the last write stands.
        s3_place.change_head(runner=other)
        try:
            claim.check()
        except HeldError:
            return True
        return False

    wait_until(lost, "not noticed")
    assert s3_place.head()["lease"]["runner"] == other
    claim.close()


def test_a_mirror_that_cannot_be_reached_at_the_start_is_said(s3_place: Place, tmp_path: Path) -> None:
    with _line_to(s3_place) as proxy:
        proxy.refusing = True
        s3_place.s3 = s3_options(proxy.url)
        with pytest.raises(DeliveryError, match="cannot be reached") as caught:
            s3_place.claim(tmp_path / JOB)
    assert caught.value.exit_code == 6
    assert not read_tree(tmp_path / JOB)


def test_asking_is_cheap_and_many_requests_are_one(file_place: Place, tmp_path: Path) -> None:
    run = write_folder(tmp_path / JOB)
    claim = file_place.claim(run.path, SnapshotPace(snapshot_s=0.5))
    claim.start()
    begun = time.monotonic()
    for number in range(200):
        run.state_file.write_text(str(number))
        claim.request()
        claim.check()
    assert time.monotonic() - begun < 2  # writing the files included
    assert claim.close()
    assert claim.head.generation <= 6


def test_the_end_waits_no_longer_than_it_may(s3_place: Place, tmp_path: Path) -> None:
    run = write_folder(tmp_path / JOB, large=5_000_000)
    said: list[str] = []
    with FaultProxy("127.0.0.1", s3_place.server.port, bytes_per_s=500_000) as proxy:
        s3_place.s3 = s3_options(proxy.url)
        claim = s3_place.claim(run.path, CALM, said)
        claim.start()
        begun = time.monotonic()
        claim.request()
        assert not claim.close(seconds=1.0)
        assert time.monotonic() - begun < 2.0
        assert any("latest changes" in text for text in said)
        proxy.cut_now()


def test_at_the_end_trials_come_before_large_caches(s3_place: Place, tmp_path: Path) -> None:
    run = write_folder(tmp_path / "a" / JOB, large=30 << 20)
    with FaultProxy("127.0.0.1", s3_place.server.port, bytes_per_s=6_000_000) as proxy:
        s3_place.s3 = s3_options(proxy.url)
        claim = s3_place.claim(run.path)
        claim.start()
        claim.request()
        wait_until(lambda: any(r.operation == "part" for r in s3_place.server.front.requests), "nothing sent")
        add_trial(run.study_file, 3)
        begun = time.monotonic()
        assert claim.close(hurry=True)
        assert time.monotonic() - begun < 4.5
    s3_place.s3 = s3_options(s3_place.server.url)
    fresh = RunFolder(tmp_path / "b" / JOB)
    s3_place.claim(fresh.path).close(final=False)
    assert len(trials_in(fresh.study_file)) == 4
    assert mirrored(fresh.path) == {k: v for k, v in mirrored(run.path).items() if not k.startswith("residuals/")}
    assert s3_place.server.uploads() == []


def test_a_stop_signal_sends_trials_before_large_caches(s3_place: Place, tmp_path: Path) -> None:
    run = write_folder(tmp_path / "a" / JOB, large=80 << 20)
    with FaultProxy("127.0.0.1", s3_place.server.port, bytes_per_s=6_000_000) as proxy:
        reached = (f"s3.endpoint={proxy.url}", "s3.addressing_style=path", "s3.region=us-east-1", "s3.part_mib=5")
        given = {"model": "-", "checkpoint": s3_place.uri}
        settings = load_settings(given, assignments=reached).settings

        def stopped() -> None:
            with held(run, IDENTITY, settings, Events(), StopSignals()) as hold:
                hold.keep()
                wait_until(lambda: any(r.operation == "part" for r in s3_place.server.front.requests), "nothing sent")
                add_trial(run.study_file, 3)
                raise Stopped("SIGTERM")

        with pytest.raises(Stopped):
            stopped()
    assert s3_place.head()["lease"]["released"]
    fresh = RunFolder(tmp_path / "b" / JOB)
    s3_place.claim(fresh.path).close(final=False)
    assert len(trials_in(fresh.study_file)) == 4


def test_an_identity_is_compared_as_it_is_written(file_place: Place, tmp_path: Path) -> None:
    file_place.claim(tmp_path / JOB).close()
    odd = {**IDENTITY, "space": (1, 2)}
    file_place.mirror().claim(RunFolder(tmp_path / JOB), odd, print).close()


def test_a_job_that_came_to_nothing_is_forgotten(place: Place, tmp_path: Path) -> None:
    run = write_folder(tmp_path / "a" / JOB)
    claim = place.claim(run.path)
    claim.start()
    claim.request()
    wait_until(lambda: claim.head.generation == 1, "no snapshot")
    claim.discard()
    run.discard()
    assert claim.close()
    assert place.head()["files"] == {}
    assert place.head()["lease"]["released"]
    assert place.objects() == set()
    place.claim(tmp_path / "b" / JOB).close(final=False)
    assert not (tmp_path / "b" / JOB / "job.json").exists()


def test_a_log_that_cannot_be_written_does_not_end_the_mirror(s3_place: Place, tmp_path: Path) -> None:
    def say(_: str) -> None:
        raise MachineError("cannot write events.jsonl: No space left on device")

    run = write_folder(tmp_path / JOB)
    claim = s3_place.mirror(QUICK).claim(run, IDENTITY, say)
    claim.start()
    left = [Answer("400 Bad Request", "Mood")] * 3
    s3_place.server.front.rules.append(lambda request, _: left.pop() if left and _is_head_put(request) else None)
    claim.request()
    wait_until(lambda: claim.head.generation == 1, "not made up for")
    assert not left
    assert claim.close()
