"""The cloud commands' output for programs, against simulated platforms."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.fakes.cloud import RunPodServer, VastServer
from tests.fakes.cloud.helpers import COMMAND, IMAGE, command, env_of
from tests.helpers import Result

READY = ("--on", "4xRTX4090", "--image", IMAGE, "--env", "HF_TOKEN")


def launched(vast: VastServer, tmp_path: Path) -> str:
    """Rent a machine; return the label of its launch."""
    vast.add_ask(1)
    return command(vast, tmp_path, "launch", *READY, "--", *COMMAND).check().out.strip()


def lines(result: Result) -> list[dict[str, Any]]:
    return [json.loads(line) for line in result.out.splitlines()]


def after_a_look(vast: VastServer, number: int, act: Callable[[], object]) -> None:
    """Act once an instance has been queried."""
    answer, pending = vast.answer, [act]

    def looked(call: Any, body: Any) -> Any:
        reply = answer(call, body)
        if call.method == "GET" and f"/instances/{number}" in call.path and pending:
            pending.pop()()
        return reply

    vast.answer = looked  # type: ignore[method-assign]


def test_a_launch_is_one_object(vast: VastServer, tmp_path: Path) -> None:
    vast.add_ask(1)
    result = command(vast, tmp_path, "launch", *READY, "--json", "--", *COMMAND).check()
    found = json.loads(result.out)
    (record,) = (tmp_path / "launches").iterdir()
    assert found == {
        **{"platform": "vast", "label": record.stem, "instance": "70001", "state": None, "status": ""},
        **{"dollars": 1.6, "cost_usd": 0.0, "outcome": None},
    }
    assert f"watch {record.stem}" in result.err


def test_a_dry_run_is_one_object(vast: VastServer, tmp_path: Path) -> None:
    vast.add_ask(1)
    words = ("--dry-run", "--json", "--env", "NOTE=plain", "--", *COMMAND)
    found = json.loads(command(vast, tmp_path, "launch", *READY, *words).check().out)
    (offer,) = json.loads(command(vast, tmp_path, "offers", "--on", "4xRTX4090", "--json").check().out)
    variables = ["HF_TOKEN", "NOTE"]
    assert found == {"offer": offer, "image": IMAGE, "command": ["abliterate", *COMMAND], "variables": variables}
    assert vast.instances == {}


def test_a_watch_is_one_object_per_change(vast: VastServer, tmp_path: Path) -> None:
    vast.add_ask(1)
    vast.add_ask(2)
    after_a_look(vast, 70001, lambda: vast.outbid(70001))
    after_a_look(vast, 70002, lambda: vast.instances.pop(70002))
    words = (*READY, "--bid", "1", "--watch", "--every", "0.05", "--json", "--", *COMMAND)
    result = command(vast, tmp_path, "launch", *words).check()
    found = lines(result)
    assert [(line["instance"], line["state"], line["outcome"]) for line in found] == [
        ("70001", None, None),
        ("70001", "running", None),
        ("70001", "outbid", None),
        ("70002", "running", None),
        ("70002", "gone", None),
        ("70002", "gone", "ended"),
    ]
    (record,) = (tmp_path / "launches").iterdir()
    assert {line["label"] for line in found} == {record.stem}
    assert {tuple(line) for line in found} == {tuple(found[0])}
    assert found[1]["dollars"] == 1.0
    assert "70001: running" in result.err


def test_a_watch_says_how_it_ends_and_keeps_its_exit_code(vast: VastServer, tmp_path: Path) -> None:
    label = launched(vast, tmp_path)
    vast.instances[70001]["actual_status"] = "exited"
    result = command(vast, tmp_path, "watch", label, "--every", "0.05", "--json")
    assert result.code == 1
    assert [(line["state"], line["outcome"]) for line in lines(result)] == [
        (None, None),
        ("exited", None),
        ("exited", "idle"),
    ]
    vast.instances[70001].update(intended_status="stopped")
    stopped = command(vast, tmp_path, "watch", label, "--every", "0.05", "--json").check()
    assert lines(stopped)[-1]["outcome"] == "stopped"
    vast.keys.clear()
    refused = command(vast, tmp_path, "watch", label, "--every", "0.05", "--json")
    assert refused.code
    assert [line["outcome"] for line in lines(refused)] in ([], [None])


def test_a_watch_that_cannot_write_its_lines_follows_the_machine_to_its_end(vast: VastServer, tmp_path: Path) -> None:
    label = launched(vast, tmp_path)
    vast.instances[70001].update(actual_status="stopped", intended_status="stopped")
    code = "from job.cli.main import main; main()"
    words = ["cloud", "vast", "watch", label, "--every", "0.05", "--json"]
    env = {**os.environ, **env_of(vast), "ABLITERATION_LAUNCHES": str(tmp_path / "launches")}
    with open("/dev/full", "w") as full:
        ended = subprocess.run(
            [sys.executable, "-c", code, *words], stdout=full, stderr=subprocess.PIPE, env=env, text=True
        )
    Result(ended.returncode, "", ended.stderr).fails(76, "cannot write the output: No space left on device")
    assert "the machine is still watched" in ended.stderr
    assert "the launch has ended" in ended.stderr


def test_an_instance_without_a_record_has_the_same_fields(vast: VastServer, tmp_path: Path) -> None:
    label = launched(vast, tmp_path)
    vast.add_instance(5, label="somebody's")
    (found,) = lines(command(vast, tmp_path, "watch", "5", "--json").check())
    assert found == {
        **{"platform": "vast", "label": "somebody's", "instance": "5", "state": "running", "status": "running"},
        **{"dollars": 0.4125, "cost_usd": None, "outcome": None},
    }
    vast.instances[70001]["actual_status"] = "exited"
    watched = command(vast, tmp_path, "watch", label, "--every", "0.05", "--json")
    assert lines(watched)[0].keys() == found.keys()


def test_fetch_names_its_files(vast: VastServer, runpod: RunPodServer, tmp_path: Path) -> None:
    vast.add_instance(9)
    folder = tmp_path / "out"
    result = command(vast, tmp_path, "fetch", "9", folder, "--json").check()
    record, log = str(folder / "9.json"), str(folder / "9.log")
    assert json.loads(result.out) == {"instance": "9", "state": "running", "record": record, "log": log}
    assert "vastai copy C.9:/workspace/" in result.err
    assert json.loads(Path(record).read_text())["state"] == "running"
    gone = json.loads(command(runpod, tmp_path, "fetch", "abc", folder, "--json").check().out)
    assert gone == {"instance": "abc", "state": "gone", "record": str(folder / "abc.json"), "log": None}


def test_destroy_names_what_it_has_destroyed(vast: VastServer, tmp_path: Path) -> None:
    label = launched(vast, tmp_path)
    vast.add_instance(9)
    refused = command(vast, tmp_path, "destroy", "9", "--json")
    refused.fails(2, "--yes")
    assert refused.out == ""
    for name, destroyed, gone in (
        ("9", ["9"], []),
        ("9", [], ["9"]),
        (label, ["70001"], []),
        (label, [], ["70001"]),
    ):
        result = command(vast, tmp_path, "destroy", name, "--yes", "--every", "0.05", "--json").check()
        assert json.loads(result.out) == {"destroyed": destroyed, "already_gone": gone}
    assert vast.instances == {}
