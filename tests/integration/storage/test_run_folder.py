"""The run folder: locked by one process, written atomically, named by the job's settings."""

from __future__ import annotations

import io
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from job.config.load import load_settings
from job.config.schema import Settings
from job.errors import HeldError, ImpossibleJobError, JobError, MachineError, UsageError
from job.lifecycle.start import as_begun
from job.records import JobRecord, Resolution, SearchMethod
from job.storage import progress
from job.storage.atomic import read_record, write_atomically, write_record
from job.storage.events import Events, read_events
from job.storage.jobs import find_folder, find_job, open_job
from job.storage.run_folder import RunFolder
from job.system.signals import StopSignals
from job.text.redaction import redact
from tests.helpers import environment


@pytest.fixture
def settings(random_model_folder: Path, tmp_path: Path) -> Settings:
    files = {}
    for name in ("good_prompts", "bad_prompts", "good_eval_prompts", "bad_eval_prompts"):
        (tmp_path / name).write_text(f"{name} one\n{name} two\n")
        files[name] = str(tmp_path / name)
    options = {"model": str(random_model_folder), "workspace": str(tmp_path / "runs"), **files}
    return load_settings(options).settings


def change(settings: Settings, **values: object) -> Settings:
    return settings.model_copy(update=values)


def test_the_job_is_named_by_what_decides_its_result(settings: Settings, tmp_path: Path) -> None:
    folder, record = open_job(settings, new=False)
    assert folder.path.name == record.job_id
    write_record(folder.job_file, record)
    # Settings that only extend the job, and locations of inputs, change nothing.
    copy = tmp_path / "copy.txt"
    copy.write_text(Path(settings.bad_prompts.spec).read_text())
    moved = settings.bad_prompts.model_copy(update={"spec": str(copy)})
    same = change(settings, trials=7, upload=["file:///x"], bad_prompts=moved)
    assert open_job(same, new=False)[0].path == folder.path
    assert open_job(same, new=False)[1].settings["trials"] == 7


def test_defaults_that_former_versions_did_not_know_leave_a_job_its_name(settings: Settings) -> None:
    """A former version's identity of the choice was its tolerance alone."""
    default = open_job(settings, new=False)[1]
    assert default.identity["choice"] == {"refusal_tolerance": 0.02}
    assert default.settings["choice"] == {"refusal_tolerance": 0.02, "held_out": 0.2}
    for share in (0.0, 0.1):
        other = change(settings, choice=settings.choice.model_copy(update={"held_out": share}))
        folder, record = open_job(other, new=True)
        assert record.identity["choice"]["held_out"] == share
        assert folder.path.name != default.job_id


def test_only_a_job_that_a_former_version_began_keeps_all_prompts(settings: Settings) -> None:
    record = open_job(settings, new=False)[1]
    assert as_begun(record, settings) == settings
    for choice, share in ((None, 0.0), ("bounds", 0.2)):
        resolution = Resolution(dtype="float32", rows=1, layers=1, choice=choice)
        begun = record.model_copy(update={"resolution": resolution})
        assert as_begun(begun, settings).choice.held_out == share


def test_a_method_that_a_former_version_did_not_name_leaves_its_job_found(settings: Settings) -> None:
    folder, record = open_job(settings, new=False)
    named = change(settings, search=settings.search.model_copy(update={"method": "tpe"}))

    def begin(method: SearchMethod | None) -> None:
        resolution = Resolution(dtype="float32", rows=1, layers=1, method=method)
        write_record(folder.job_file, record.model_copy(update={"resolution": resolution}))

    begin(None)
    assert open_job(named, new=False)[0].path == find_folder(named).path == folder.path
    begin("gradient")
    assert find_folder(named).path != folder.path
    with pytest.raises(UsageError, match=r"search\.method was null"):
        open_job(named, new=False)


def test_other_settings_on_the_same_model_are_refused_with_the_differences(settings: Settings) -> None:
    folder, record = open_job(settings, new=False)
    write_record(folder.job_file, record)
    other = change(settings, seed=5, ablation=settings.ablation.model_copy(update={"row_normalization": "full"}))
    with pytest.raises(UsageError) as caught:
        open_job(other, new=False)
    assert "seed was 0, is 5" in caught.value.line
    assert 'ablation.row_normalization was "none", is "full"' in caught.value.line
    assert open_job(other, new=True)[0].path != folder.path


def test_start_up_trials_are_fixed_at_the_first_start(settings: Settings) -> None:
    folder, record = open_job(change(settings, trials=30), new=False)
    write_record(folder.job_file, record)
    assert record.startup_trials == 10
    assert open_job(change(settings, trials=90), new=False)[1].startup_trials == 10


def test_a_changed_model_or_prompt_is_another_job(settings: Settings, random_model_folder: Path) -> None:
    first = open_job(settings, new=False)[0]
    file = Path(settings.bad_prompts.spec)
    file.write_text(file.read_text() + "three\n")
    assert open_job(settings, new=True)[0].path != first.path


def test_missing_inputs(settings: Settings, tmp_path: Path) -> None:
    with pytest.raises(ImpossibleJobError, match="no model folder"):
        open_job(change(settings, model=str(tmp_path / "absent")), new=False)
    absent = settings.bad_prompts.model_copy(update={"spec": str(tmp_path / "absent.txt")})
    with pytest.raises(ImpossibleJobError, match="no prompt file"):
        open_job(change(settings, bad_prompts=absent), new=False)
    assert not (tmp_path / "runs").exists()


def test_a_workspace_that_cannot_be_written(settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(MachineError, match="cannot write") as caught:
        open_job(change(settings, workspace=str(tmp_path / "file" / "runs")), new=False)
    assert caught.value.exit_code == 76


def test_a_job_is_held_by_one_process_and_released_by_its_death(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    code = (
        "import sys, time; from pathlib import Path; from job.storage.run_folder import RunFolder\n"
        f"with RunFolder(Path({str(tmp_path)!r})).held(): print('held', flush=True); time.sleep(60)"
    )
    other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment())
    assert other.stdout is not None
    assert other.stdout.readline() == "held\n"
    assert folder.is_held()
    with pytest.raises(HeldError, match=f"process {other.pid} on"), folder.held():
        pass
    other.kill()
    other.communicate()
    assert not folder.is_held()
    with folder.held():
        assert folder.is_held()


def test_find_job(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no job"):
        find_job(tmp_path / "absent", None)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        record = JobRecord(job_id=name, identity={}, settings={}, startup_trials=1, versions={})
        write_record(tmp_path / name / "job.json", record)
    with pytest.raises(UsageError, match="a, b"):
        find_job(tmp_path, None)
    with pytest.raises(UsageError) as caught:
        find_job(tmp_path, "c")
    assert "choose from: a, b" in caught.value.line
    assert find_job(tmp_path, "b").path == tmp_path / "b"


def test_atomic_writes_leave_no_trace_of_failures(tmp_path: Path) -> None:
    write_atomically(tmp_path / "x", b"old")
    with pytest.raises(MachineError, match="cannot write"):
        write_atomically(tmp_path / "absent" / "x", b"new")
    (tmp_path / "folder").mkdir()
    with pytest.raises(MachineError):
        write_atomically(tmp_path / "folder", b"a folder is in the way")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "x"]
    assert (tmp_path / "x").read_bytes() == b"old"


def test_writers_at_once_do_not_meet(tmp_path: Path) -> None:
    file, contents = tmp_path / "file", [bytes([number]) * 50_000 for number in range(4)]

    def write(data: bytes) -> None:
        for _ in range(50):
            write_atomically(file, data)

    with ThreadPoolExecutor() as threads:
        assert list(threads.map(write, contents)) == [None] * 4
    assert file.read_bytes() in contents
    assert list(tmp_path.iterdir()) == [file]


def test_damaged_records_are_told_by_file(tmp_path: Path) -> None:
    (tmp_path / "job.json").write_text("{")
    with pytest.raises(JobError, match=r"job\.json cannot be read"):
        read_record(tmp_path / "job.json", JobRecord)


def test_events_survive_a_torn_line_and_never_hold_a_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "very-secret-value")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "another/secret+value")
    file = tmp_path / "events.jsonl"
    file.write_text('{"event": "first"}\n{"event": "to')
    events = Events(stream=(tmp_path / "console").open("w"))
    events.log_to(file)
    events.emit("try", "with very-secret-value", detail={"key": "another/secret+value", "tok": "hf_" + "a" * 30})
    events._stream.close()
    assert [event["event"] for event in read_events(file)] == ["first", "try"]
    for text in (file.read_text(), (tmp_path / "console").read_text()):
        for secret in ("very-secret-value", "another/secret+value", "hf_aaa"):
            assert secret not in text
    assert redact("nothing to hide") == "nothing to hide"


def test_plain_progress_prints_lines_and_a_terminal_gets_bars(tmp_path: Path) -> None:
    import os
    import pty

    code = (
        "from job.storage.events import Events\n"
        "events = Events()\n"
        "with events.progress('trials', 3) as advance:\n"
        "    for _ in range(3):\n"
        "        events.emit('trial', 'a trial')\n"
        "        advance(1)\n"
    )
    plain = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment())
    assert plain.stderr == "a trial\n" * 3
    leader, follower = pty.openpty()
    subprocess.run([sys.executable, "-c", code], stderr=follower, env=environment(TERM="xterm"), check=True)
    os.close(follower)
    shown = os.read(leader, 1 << 16).decode()
    os.close(leader)
    assert "3/3" in shown
    assert "ETA" in shown
    assert "a trial" in shown


def test_plain_progress_prints_a_line_now_and_then_also_while_no_step_ends() -> None:
    stream = io.StringIO()
    told = Events(stream=stream)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(progress, "_SECONDS", 0.1)
        with told.progress("trials", 3, 0, lambda: "best: 1/9") as advance:
            time.sleep(0.25)
            advance(1)
            time.sleep(0.25)
        with told.progress("loading the model", 1):
            time.sleep(0.25)
    lines = stream.getvalue().splitlines()
    assert re.fullmatch(r"trials: 0/3, 0\.\d s so far; best: 1/9", lines[0])
    assert any(re.fullmatch(r"trials: 1/3, [\d.]+ a second, ETA [\d.]+ s; best: 1/9", line) for line in lines)
    assert re.fullmatch(r"loading the model: 0\.\d s so far", lines[-1])
    time.sleep(0.2)
    assert stream.getvalue().splitlines() == lines  # no output after the end of a stage


def test_a_jobs_lines_tell_the_time_and_minor_events_are_recorded_and_shown_on_request(tmp_path: Path) -> None:
    for verbose in (False, True):
        stream, file = io.StringIO(), tmp_path / f"events-{verbose}.jsonl"
        told = Events(stream=stream, verbose=verbose)
        told.say("before the job")
        told.log_to(file)
        told.emit("trial", "trial 1", minor=True, number=1)
        told.emit("trial", "trial 2", number=2)
        shown = stream.getvalue().splitlines()
        assert shown == ["before the job", *(["[0:00] trial 1"] if verbose else []), "[0:00] trial 2"]
        assert [(event["number"], event["message"]) for event in read_events(file)] == [(1, "trial 1"), (2, "trial 2")]


def test_signals_stop_at_once_or_after_the_shield() -> None:
    code = (
        "import os, signal, sys, time\n"
        "from job.errors import Stopped\n"
        "from job.system.signals import StopSignals\n"
        "signals = StopSignals()\n"
        "with signals.installed():\n"
        "    try:\n"
        "        with signals.shielded():\n"
        "            os.kill(os.getpid(), signal.SIGTERM); time.sleep(0.01); print('written', flush=True)\n"
        "        print('too far')\n"
        "    except Stopped as stop:\n"
        "        print(stop, flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGINT); time.sleep(5); print('still here')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment())
    assert done.stdout == "written\nSIGTERM\n"
    assert done.returncode == 75  # the second signal leaves the process at once


def test_handlers_are_restored() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with StopSignals().installed():
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before
