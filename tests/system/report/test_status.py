"""`abliterate status`: its output on a terminal, in a log and for programs; and the study in Optuna."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import termios
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from job.cli.watch import follow
from job.report.status import job_status, status_text
from job.report.timings import phase_times
from job.storage.run_folder import RunFolder
from job.text.durations import duration_text
from tests.helpers import COMMAND, abliterate, environment, events, job_arguments, only_job, start, stored_trials


@pytest.fixture
def preempted(finished: Path, tmp_path: Path) -> Path:
    """Return a workspace whose job is recorded as running, without a process."""
    workspace = tmp_path / "runs"
    shutil.copytree(finished, workspace, symlinks=True)
    file = only_job(workspace) / "state.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "state": "running", "phase": "search"}))
    return workspace


def test_status_tells_phase_progress_cost_front_events_and_warnings(preempted: Path) -> None:
    job = only_job(preempted)
    with (job / "events.jsonl").open("a") as log:
        log.write(json.dumps({"time": 1.0, "event": "message", "message": "warning: the checkpoint is down"}) + "\n")
    preflight = json.loads((job / "preflight.json").read_text())
    for check in preflight["checks"]:
        check["status"] = "ok"  # a busy machine's disk may be slow
    preflight["checks"][0] |= {"status": "warn", "measured": "hardly"}
    (job / "preflight.json").write_text(json.dumps(preflight))
    (job / "meter.json").write_text(json.dumps({"seconds": 4000.0, "dollars": 2.75}))
    status = json.loads(abliterate("status", "--workspace", preempted, "--json").check().out)
    assert (status["state"], status["phase"], status["chosen"]) == ("preempted", "search", None)
    assert (status["spent_s"], status["cost_usd"]) == (4000.0, 2.75)
    assert status["leading"] in {best["number"] for best in status["best"]}
    assert status["warnings"] == [
        f"preflight: warn: {preflight['checks'][0]['name']}: hardly",
        "the checkpoint is down",
    ]
    assert [event["message"] for event in status["events"]][-1] == "warning: the checkpoint is down"
    text = abliterate("status", "--workspace", preempted).check().out
    for part in ("phase: search", "trials: 20 of 20", "1 h 6 min, $2.75", "<- best so far", "the checkpoint is down"):
        assert part in text
    narrow = status_text(status, 40)
    assert max(map(len, narrow.replace(str(job), "").splitlines())) <= 40
    assert "".join(narrow.split()) == "".join(text.split())


def test_a_running_job_is_watched_to_its_end(organism: Path, tmp_path: Path) -> None:
    workspace = tmp_path / "runs"
    run = start("run", *job_arguments(organism), "--workspace", workspace, "--trials", 8, "--price", 1)
    try:
        while not list(workspace.glob("*/state.json")):
            assert run.poll() is None, run.communicate()[1]
            time.sleep(0.02)
        watched = abliterate("status", "--workspace", workspace, "--watch", "--interval", 0.1, "--json").check()
        assert run.wait(300) == 0
    finally:
        run.kill()
        run.communicate()
    seen = [json.loads(line) for line in watched.out.splitlines()]
    assert seen[-1]["state"] == "finished"
    assert {"preflight", "search"} <= {one["phase"] for one in seen}
    searching = [one for one in seen if one["state"] == "running" and 0 < one["trials"]["done"] < 8]
    assert all(one["eta_total_s"] > 0 for one in searching)
    done = [one["trials"]["done"] for one in seen]
    assert done == sorted(done)
    assert len({json.dumps([one["state"], one["phase"], one["trials"]["done"]]) for one in seen}) > 3
    found = {phase.name: phase for phase in phase_times(events(workspace))}
    assert list(found) == ["preflight", "model", "directions", "search", "export", "upload"]
    total = job_status(RunFolder(only_job(workspace)))["spent_s"]
    assert 0.8 * total < sum(phase.seconds for phase in found.values()) <= total + 0.1
    assert all(phase.dollars == pytest.approx(phase.seconds / 3600) for phase in found.values())


def test_a_watch_without_a_terminal_writes_a_line_a_change(finished: Path) -> None:
    lines = abliterate("status", "--workspace", finished, "--watch").check().out.splitlines()
    assert len(lines) == 1
    assert re.search(r"^\S+  finished: 20 of 20 trials; best: trial \d+, \d+/20 refusals, KL ", lines[0])


def test_a_front_fits_a_narrow_terminal(finished: Path) -> None:
    screen, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 60, 0, 0))
    told = {name: value for name, value in environment(TERM="xterm").items() if name not in ("COLUMNS", "LINES")}
    subprocess.run([*COMMAND, "front", "--workspace", finished], stdout=terminal, env=told, check=True)
    os.close(terminal)
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", os.read(screen, 65536).decode())
    os.close(screen)
    lines = shown.splitlines()
    assert max(map(len, lines)) <= 60
    assert {line[:2] for line in lines} == {"tr", "  "}  # trials, and indented continuations
    plain = abliterate("front", "--workspace", finished).check().out
    assert " ".join(plain.split()) == " ".join(shown.split())


def test_a_watch_on_a_phone_waits_for_a_preempted_job_until_it_is_interrupted(preempted: Path) -> None:
    screen, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 60, 42, 0, 0))
    # COLUMNS may be set, e.g. by pytest-xdist, and overrides the terminal's own width.
    told = {name: value for name, value in environment(TERM="xterm").items() if name not in ("COLUMNS", "LINES")}
    process = subprocess.Popen(
        # If the tests run in the background of a shell, they and their child processes ignore interrupts.
        [
            *("env", "--default-signal=INT", *COMMAND, "status"),
            "--workspace",
            preempted,
            "--watch",
            "--interval",
            "0.2",
        ],
        stdout=terminal,
        stderr=subprocess.PIPE,
        env=told,
        text=True,
    )
    os.close(terminal)
    shown = ""
    while shown.count("preempted") < 2:  # redrawn
        shown += os.read(screen, 65536).decode()
    process.send_signal(signal.SIGINT)
    while True:
        try:
            shown += os.read(screen, 65536).decode()
        except OSError:
            break  # the other end of the terminal is closed
    assert (process.communicate()[1], process.returncode) == ("", 130)
    os.close(screen)
    assert shown.index("\x1b[?25l") < shown.rindex("\x1b[?25h")  # the cursor is visible again
    painted = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown)
    assert max(map(len, painted.replace("\r", "\n").splitlines())) <= 42


def test_a_checkpoint_that_cannot_be_reached_for_a_while_is_waited_for(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from job.errors import DeliveryError

    whole = job_status(RunFolder(only_job(finished)), running=True)
    readings: list[Any] = [whole, DeliveryError("no route to it", remedy="wait"), {**whole, "state": "finished"}]

    def read() -> dict[str, Any]:
        found = readings.pop(0)
        if isinstance(found, Exception):
            raise found
        return dict(found)

    follow(read, 0.01, as_json=False)
    lines = capsys.readouterr().out.splitlines()
    assert ["running" in lines[0], "no route" in lines[1], "finished" in lines[2]] == [True] * 3
    with pytest.raises(DeliveryError):
        follow(lambda: (_ for _ in ()).throw(DeliveryError("down", remedy="")), 0.01, as_json=True)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (1.26, "1.3 s"),
        (59, "59 s"),
        (61, "1 min 1 s"),
        (3599, "59 min 59 s"),
        (5400, "1 h 30 min"),
        (266400, "3 d 2 h"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration_text(seconds) == text


def test_phases_add_up_over_starts_and_gaps_between_them_do_not_count() -> None:
    said: list[dict[str, Any]] = [
        {"time": 0.0, "event": "job_started", "price": 3.6},
        {"time": 1.0, "event": "phase", "name": "preflight"},
        {"time": 3.0, "event": "phase", "name": "search"},
        {"time": 13.0, "event": "trial"},  # and then it is killed
        {"time": 1000.0, "event": "job_started", "price": None},
        {"time": 1001.0, "event": "phase", "name": "search"},
        {"time": 1005.0, "event": "job_finished"},
        {"time": 2000.0, "event": "loading"},  # of a later export
    ]
    found = [(phase.name, phase.seconds, phase.dollars) for phase in phase_times(said)]
    assert found == [("preflight", 2.0, pytest.approx(0.002)), ("search", 14.0, pytest.approx(0.01))]
    assert phase_times([{"time": 0.0, "event": "job_started"}, {"time": 9.0, "event": "trial"}]) == []


def test_optuna_dashboard_shows_the_study_as_it_is(finished: Path) -> None:
    study = only_job(finished) / "study.db"
    before = study.read_bytes()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = "import sys; from optuna_dashboard._cli import main; sys.exit(main())"
    process = subprocess.Popen(
        [sys.executable, "-c", command, f"sqlite:///{study}", "--port", str(port), "--host", "127.0.0.1"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env=environment(),
        text=True,
    )

    def ask(path: str) -> Any:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/api/{path}", timeout=10) as answer:
            return json.load(answer)

    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                (summary,) = ask("studies")["study_summaries"]
                break
            except OSError:
                assert process.poll() is None, process.communicate()[1]
                assert time.monotonic() < deadline
                time.sleep(0.1)
        found = ask(f"studies/{summary['study_id']}")
    finally:
        process.terminate()
        process.communicate()
    stored = stored_trials(finished)
    assert [trial["number"] for trial in found["trials"]] == [trial["number"] for trial in stored]
    assert all(trial["state"] == "Complete" for trial in found["trials"])
    values = [dict(enumerate(trial["values"])) for trial in found["trials"]]
    assert values == [trial["values"] for trial in stored]
    assert study.read_bytes() == before
