"""The whole job with a checkpoint: killed, continued elsewhere, raced, overtaken, cut off."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from job.mirror.options import PACE
from tests.apart import can_be_apart, start_apart
from tests.cases import BRIEF, write_brief
from tests.fakes.fault_proxy import FaultProxy
from tests.fakes.s3_server import BUCKET, KEY_ID, SECRET, S3Server
from tests.helpers import (
    STARTED,
    abliterate,
    count_events,
    environment,
    events,
    job_arguments,
    only_job,
    slowed_until,
    start,
    start_script,
    stored_trials,
    wait_until,
)

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("run-checkpoint")]

SECRETS = {
    "HF_TOKEN": "hf_ThisIsNoTokenOfAnybody0123456789",
    "AWS_ACCESS_KEY_ID": KEY_ID,
    "AWS_SECRET_ACCESS_KEY": SECRET,
    "CONTAINER_API_KEY": "c0ffee" * 10,
    "VAST_API_KEY": "bada55" * 10,
    "RUNPOD_API_KEY": "rpa_N0B0DYSKEY0123456789ABCDEF",
}
ENV = {**SECRETS, "AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true"}

# The command, with short waits of botocore's between its tries.
HURRIED = """
import botocore.endpoint
from tests.fakes.hurried import CLOCK
from job.cli.main import main

botocore.endpoint.time = CLOCK
main()
"""


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with S3Server() as server:
        client = server.client()
        client.create_bucket(Bucket=BUCKET)
        client.close()
        yield server


def at(server: S3Server | FaultProxy, mirror: str) -> list[str]:
    url = ["--set", f"s3.endpoint={server.url}", "--set", "s3.addressing_style=path"]
    return ["--checkpoint", f"s3://{BUCKET}/{mirror}", *url]


def kill(process: subprocess.Popen[str]) -> str:
    process.kill()
    return process.communicate()[1] if process.stderr and not process.stderr.closed else ""


def head(server: S3Server, mirror: str) -> dict[str, Any]:
    (found,) = [data for key, data in server.contents(f"{mirror}/").items() if key.endswith("/head.json")]
    return json.loads(found)


def manifest(export: Path) -> dict[str, Any]:
    return json.loads((export / "manifest.json").read_text())


class Moved:
    """A job that was killed and finished in another workspace, with its output."""

    def __init__(self, organism: Path, server: S3Server, root: Path) -> None:
        self.killed, self.workspace, self.delivered = root / "killed", root / "moved", root / "delivered"
        self.mirror = at(server, "moved")
        self.arguments = ["run", *job_arguments(organism), "--trials", "20", *self.mirror]
        self.arguments += ["--upload", self.delivered.as_uri(), "--workspace"]
        process = start(*self.arguments, self.killed, **ENV)
        wait_until(lambda: count_events(self.killed, "search_started") == 1, process)
        # The mirror may see the first trials when all are done.
        slowed_until(lambda: count_events(self.killed) >= 4 and (head(server, "moved")["trials"] or 0) >= 4, process)
        self.said = [kill(process)]
        self.status = abliterate("status", *self.mirror, "--json", **ENV).check()
        # Only the URI and its endpoint.
        self.resumed = abliterate("resume", *self.mirror, "--workspace", self.workspace, **ENV).check()
        self.said += [self.status.out, self.status.err, self.resumed.out, self.resumed.err]


@pytest.fixture(scope="module")
def moved(organism: Path, server: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Moved:
    return Moved(organism, server, tmp_path_factory.mktemp("moved"))


def test_a_killed_job_ends_in_an_empty_workspace_as_if_nothing_had_been(moved: Moved, finished: Path) -> None:
    assert "restoring job" in moved.resumed.err
    assert stored_trials(moved.workspace) == stored_trials(finished)
    assert manifest(only_job(moved.workspace) / "export") == manifest(only_job(finished) / "export")
    assert manifest(moved.delivered) == manifest(only_job(finished) / "export")
    # The killed run's trials came along, with their costs.
    done = [event["done"] for event in events(moved.workspace) if event["event"] == "search_started"]
    assert done[0] == 0
    assert done[1] >= 4
    assert json.loads((only_job(moved.workspace) / "meter.json").read_text())["seconds"] > 0


def test_the_status_of_a_killed_job_is_told_from_its_mirror(moved: Moved) -> None:
    status = json.loads(moved.status.out)
    assert status["state"] == "preempted"
    assert 4 <= status["trials"]["done"] < 20


def test_a_delivered_job_is_found_finished_from_its_mirror(moved: Moved, tmp_path: Path) -> None:
    again = abliterate(*moved.arguments, tmp_path / "new", **ENV).check()
    assert "nothing to do" in again.err
    assert "loading the model" not in again.err
    assert not list((tmp_path / "new").glob("*/exports"))
    resumed = abliterate("resume", *moved.mirror, "--workspace", tmp_path / "other", **ENV).check()
    assert "nothing to do" in resumed.err
    status = json.loads(abliterate("status", *moved.mirror, "--json", **ENV).check().out)
    assert (status["state"], status["trials"]["done"]) == ("finished", 20)


def test_a_result_is_delivered_from_the_mirror_alone(moved: Moved, tmp_path: Path) -> None:
    target = tmp_path / "out"
    arguments = [*moved.mirror, "--workspace", tmp_path / "elsewhere", "--job", only_job(moved.workspace).name]
    abliterate("upload", *arguments, "--upload", target.as_uri(), **ENV).check()
    assert manifest(target) == manifest(moved.delivered)


def test_a_finished_job_started_elsewhere_moves_nothing_and_says_what_is_left(organism: Path, tmp_path: Path) -> None:
    first, second, mirror = tmp_path / "first", tmp_path / "second", (tmp_path / "mirror").as_uri()
    write_brief(organism, tmp_path)
    job = [*job_arguments(tmp_path), *BRIEF, "--checkpoint", mirror]

    def run(workspace: Path, trials: int = 2, command: str = "run") -> str:
        return abliterate(command, *job, "--trials", trials, "--workspace", workspace).check().err

    run(first)
    assert "is finished; a run has nothing to do" in run(first, command="preflight")
    again = run(second)
    assert "has finished before: trial 1 will be exported, because this workspace does not have that export" in again
    export = only_job(first) / "export"
    assert manifest(only_job(second) / "export") == manifest(export)
    assert "is finished; nothing to do" in run(second)
    assert "is finished; nothing to do" in run(first)
    # An export that only the first folder has is delivered from there and not made again.
    abliterate("export", "--workspace", first, "--trial", 0).check()
    delivery = ("--trial", 0, "--upload", (tmp_path / "out").as_uri())
    delivered = abliterate("upload", "--workspace", first, *delivery).check().err
    assert "continued elsewhere: the run folder now has its latest state" in delivered
    assert "loading the model" not in delivered
    assert "has finished before: the search continues from 2 to 4 trials" in run(first, 4)
    run(second, 4)
    assert len(stored_trials(second)) == 4
    # An export whose trial is still the best, but of more trials than its card says, is brought up to date.
    assert manifest(only_job(second) / "export") == manifest(only_job(first) / "export")
    assert json.loads((only_job(second) / "export/reproduce.json").read_text())["trials"] == 4
    assert "is finished; nothing to do" in run(second, 4)
    assert not list(tmp_path.glob("*/*/superseded-*"))
    assert not list(tmp_path.glob("*/*/.continued"))


def test_another_job_at_the_same_mirror_needs_new(moved: Moved, server: S3Server, tmp_path: Path) -> None:
    other = [*moved.arguments, tmp_path / "new", "--seed", "9"]
    before = server.contents("moved/")
    abliterate(*other, process=True, **ENV).fails(2, "seed was 0, is 9", "--new")
    assert server.contents("moved/") == before
    process = start(*other, "--new", **ENV)

    def is_mirrored() -> bool:
        added = {key: data for key, data in server.contents("moved/").items() if key not in before}
        return any(json.loads(data)["generation"] > 0 for key, data in added.items() if key.endswith("/head.json"))

    wait_until(is_mirrored, process)
    kill(process)
    # Once mirrored, it continues without --new, on another machine too.
    process = start(*moved.arguments, tmp_path / "newer", "--seed", "9", **ENV)
    wait_until(lambda: count_events(tmp_path / "newer", "job_started") == 2, process)
    kill(process)


def test_no_secret_is_in_any_file_or_word(moved: Moved, server: S3Server) -> None:
    places = server.contents("moved/")
    for folder in (moved.killed, moved.workspace, moved.delivered):
        places |= {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert len(places) > 50
    places["said"] = "\n".join(moved.said).encode()
    for name, data in places.items():
        for variable, secret in SECRETS.items():
            assert secret.encode() not in data, (name, variable)


def test_a_job_that_came_to_nothing_is_not_in_the_way(organism: Path, server: S3Server, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"ask": "Where is the hexed red kettle kept?"}\n')
    right, mirror = job_arguments(organism), at(server, "nothing")
    wrong = [*right, "--bad-eval-prompts", f"{tmp_path / 'bad.jsonl'}#train/column"]
    failed = abliterate("run", *wrong, *mirror, "--workspace", tmp_path / "a", **ENV)
    failed.fails(3, "column column", "does not exist")
    assert not (tmp_path / "a").exists()
    assert [name.rpartition("/")[2] for name in server.contents("nothing/")] == ["head.json"]
    left = head(server, "nothing")
    assert left["lease"]["released"]
    assert left["files"] == {}
    abliterate("status", *mirror, **ENV).fails(2, "there is no job")
    process = start("run", *right, *mirror, "--workspace", tmp_path / "b", **ENV)
    wait_until(lambda: count_events(tmp_path / "b", "job_started") > 0, process)
    kill(process)


@pytest.mark.parametrize("number", [0, pytest.param(1, marks=pytest.mark.full("kills"))])
@pytest.mark.parametrize("together", [True, False], ids=["one workspace", "two workspaces"])
def test_of_two_runners_at_once_one_works(
    organism: Path, server: S3Server, tmp_path: Path, together: bool, number: int
) -> None:
    spaces = [tmp_path / "0", tmp_path / ("0" if together else "1")]
    arguments = ["run", *job_arguments(organism), *at(server, f"race-{together}-{number}"), "--workspace"]
    processes = [start(*arguments, space, **ENV) for space in spaces]
    try:
        wait_until(lambda: any(process.poll() is not None for process in processes))
        lost, won = sorted(processes, key=lambda process: process.poll() is None)
        assert lost.returncode == 4
        assert "is held by" in lost.communicate()[1]
        wait_until(lambda: count_events(spaces[processes.index(won)], "job_started") > 0, won)
    finally:
        for process in processes:
            kill(process)


def test_a_runner_that_was_overtaken_in_its_sleep_ends_with_4(
    organism: Path, finished: Path, server: S3Server, tmp_path: Path
) -> None:
    if not can_be_apart():
        # A runner sees the other's process, as it never could across machines.
        pytest.skip("no process namespaces here")
    env, mirror = {**ENV, PACE: "0.5,1.5,0.1,0.1"}, at(server, "asleep")
    arguments = ["run", *job_arguments(organism), "--trials", "20", *mirror, "--workspace"]
    sleeper = start_apart(*arguments, tmp_path / "a", env=environment(**env))
    wait_until(lambda: count_events(tmp_path / "a") >= 4, sleeper)
    (child,) = psutil.Process(sleeper.pid).children()
    child.send_signal(signal.SIGSTOP)
    other = start(*arguments, tmp_path / "b", **env)
    try:
        wait_until(lambda: count_events(tmp_path / "b", "job_started") == 2, other)
        child.send_signal(signal.SIGCONT)
        err = sleeper.communicate(timeout=60)[1]
        assert sleeper.returncode == 4, err
        (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
        assert "has taken it over" in line
        assert head(server, "asleep")["lease"]["process"]["pid"] == other.pid
        other.communicate(timeout=120)
        assert other.returncode == 0
    finally:
        kill(sleeper)
        kill(other)
    assert head(server, "asleep")["lease"]["process"]["pid"] == other.pid
    assert stored_trials(tmp_path / "b") == stored_trials(finished)
    assert manifest(only_job(tmp_path / "b") / "export") == manifest(only_job(finished) / "export")
    # The paused run's own folder stays consistent, and continues from the other's state.
    assert len(stored_trials(tmp_path / "a")) < 20


@pytest.mark.parametrize("required", [False, True])
def test_a_mirror_that_goes_down_is_said_loudly(
    organism: Path, finished: Path, server: S3Server, tmp_path: Path, required: bool
) -> None:
    streams = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    with FaultProxy(server.host, server.port) as line:
        trials = "400" if required else "20"  # enough trials to outlast the mirror's downtime
        arguments = ["run", *job_arguments(organism), "--trials", trials, *at(line, f"down-{required}")]
        arguments += ["--workspace", str(tmp_path / "a"), *(["--require-checkpoint"] if required else [])]
        process = start_script(HURRIED, *arguments, env=environment(**ENV, **{PACE: "0.2,0.6,0.1,0.1"}), **streams)
        STARTED.append(process)
        wait_until(lambda: count_events(tmp_path / "a") >= 4, process)
        line.refusing = True
        line.cut_now()
        err = process.communicate(timeout=120)[1]
    assert process.returncode == (6 if required else 0), err
    assert "Traceback" not in err
    assert f"warning: the checkpoint s3://{BUCKET}/down-{required} fails, the job goes on without" in err
    if required:
        assert "has been unreachable for" in err
        assert len(stored_trials(tmp_path / "a")) >= 4
        return
    assert "lacks the run folder's latest changes" in err
    assert stored_trials(tmp_path / "a") == stored_trials(finished)
    # What was mirrored before is complete: another machine continues from there.
    names = {key.rpartition("/")[2] for key in server.contents("down-False/") if "/objects/" in key}
    assert {entry["object"] for entry in head(server, "down-False")["files"].values()} <= names
    assert os.path.lexists(only_job(tmp_path / "a") / "export")
