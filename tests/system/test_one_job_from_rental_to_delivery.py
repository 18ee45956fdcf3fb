"""The whole story: rented, outbid half-way, continued on an empty machine, delivered, and stopped once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from job.mirror.options import PACE
from tests.apart import UNSHARE, start_apart
from tests.fakes.cloud import KEY, VastServer
from tests.fakes.cloud.helpers import IMAGE, TOKEN, env_of
from tests.fakes.s3_server import BUCKET, KEY_ID, SECRET, S3Server
from tests.helpers import environment, job_arguments, only_job, start, stored_trials, wait_until

ENTRYPOINT = Path(__file__).parents[2] / "entrypoint.sh"
TRIALS = 20


class Host:
    """A rented machine: an empty disk, its own PID namespace, and the platform's command.

    The first starts as the image does, by its entrypoint; the others fork from a process that has loaded the libraries.
    """

    def __init__(self, vast: VastServer, number: int, disk: Path, *, by_entrypoint: bool = False) -> None:
        creations = [body for body in vast.bodies if body and "image" in body]
        order = creations[number - 70001]
        assert order["image"] == IMAGE
        self.workspace = disk
        disk.mkdir()
        env = {name: value for name, value in environment().items() if not name.startswith(("HF_TOKEN", "AWS_"))}
        rented = {"CONTAINER_ID": str(number), "CONTAINER_API_KEY": KEY, "VAST_URL": vast.url}
        env |= {**order["env"], **rented, PACE: "0.5,2,0.1,0.1", "ABLITERATE_WORKSPACE": str(disk)}
        if by_entrypoint:
            env |= {"PATH": f"{Path(sys.executable).parent}:{env['PATH']}", "HOME": str(disk)}
            streams = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
            command = [*UNSHARE, str(ENTRYPOINT), *order["args"]]
            self.process = subprocess.Popen(command, text=True, env=env, **streams)
        else:
            self.process = start_apart(*order["args"], env=env)

    def told(self) -> int:
        return sum(path.read_text().count('"event": "trial"') for path in self.workspace.glob("*/events.jsonl"))

    def vanish(self) -> None:
        for process in psutil.Process(self.process.pid).children(recursive=True):
            process.kill()
        end(self.process)


def end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait()
    if process.stderr:
        process.stderr.close()


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="namespaces need root")
def test_a_job_outlives_its_machine_and_stops_the_meter_once(
    organism: Path, finished: Path, vast: VastServer, tmp_path: Path
) -> None:
    vast.add_ask(1)
    vast.add_ask(2)
    with S3Server() as server:
        client = server.client()
        client.create_bucket(Bucket=BUCKET)
        client.close()
        story(organism, finished, vast, server, tmp_path)


def story(organism: Path, finished: Path, vast: VastServer, server: S3Server, tmp_path: Path) -> None:
    keys = {"AWS_ACCESS_KEY_ID": KEY_ID, "AWS_SECRET_ACCESS_KEY": SECRET}
    own = {**env_of(vast), **keys, "ABLITERATION_LAUNCHES": str(tmp_path / "launches"), "AWS_REGION": "us-east-1"}
    job: list[Any] = ["run", *job_arguments(organism), "--trials", TRIALS, "--checkpoint", f"s3://{BUCKET}/state"]
    job += ["--upload", f"s3://{BUCKET}/edited", "--when-done", "destroy", "--when-failed", "nothing"]
    job += ["--set", f"s3.endpoint={server.url}", "--set", "s3.addressing_style=path"]
    passed = [word for name in (*keys, "HF_TOKEN", "AWS_REGION=us-east-1") for word in ("--env", name)]
    terms = ["--on", "4xRTX4090", "--interruptible", "--image", IMAGE, "--watch", "--every", "0.2"]
    launch = start("cloud", "vast", "launch", *terms, *passed, "--", *job, **own)
    hosts: list[Host] = []
    try:
        wait_until(lambda: 70001 in vast.instances, launch)
        hosts.append(Host(vast, 70001, tmp_path / "first", by_entrypoint=True))
        wait_until(lambda: hosts[0].told() >= 8, launch, hosts[0].process)
        hosts[0].vanish()
        vast.outbid(70001)
        wait_until(lambda: 70002 in vast.instances, launch)
        assert 70001 not in vast.instances
        hosts.append(Host(vast, 70002, tmp_path / "second"))
        said = hosts[1].process.communicate(timeout=180)[1]
        assert hosts[1].process.returncode == 0, said
        assert "restoring job" in said
        followed = launch.communicate(timeout=60)[1]
        assert launch.returncode == 0, followed
        # The higher bidder is gone, and the first machine's folder is started again: it must not keep billing.
        vast.add_instance(70001, is_bid=True)
        back = Host(vast, 70001, tmp_path / "back")
        hosts.append(back)
        again = back.process.communicate(timeout=60)[1]
        assert back.process.returncode == 0, again
        assert "nothing to do" in again
    finally:
        for process in (launch, *(host.process for host in hosts)):
            end(process)
    assert vast.instances == {}
    # By the watch when outbid, by the job when delivered, by the command that found the job finished.
    assert [request.path.strip("/").rpartition("/")[2] for request in vast.asked("DELETE")] == [
        "70001",
        "70002",
        "70001",
    ]
    assert stored_trials(hosts[1].workspace) == stored_trials(finished)
    delivered = server.contents("edited/")
    expected = json.loads((only_job(finished) / "export" / "manifest.json").read_text())
    assert json.loads(delivered["edited/manifest.json"]) == expected
    for secret in (KEY, TOKEN, SECRET):
        assert secret not in said + followed + again
