"""State of one start in the run folder: stage, end, time and cost."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from job.config.schema import Settings
from job.errors import (
    AcceleratorFaultError,
    ImpossibleJobError,
    JobError,
    MachineError,
    RestartNeeded,
    Stopped,
    UsageError,
)
from job.lifecycle.lock import JobLock
from job.records import State
from job.search.budget import Meter
from job.search.method import trials_wanted
from job.storage.atomic import write_record
from job.storage.events import Events, read_events
from job.storage.identity import short_hash
from job.storage.job_file import JobFile
from job.storage.run_folder import RunFolder

# Fresh processes tried after device faults, without a trial in between.
_MOST_FAULTS = 3


@contextmanager
def recorded(
    folder: RunFolder, file: JobFile, settings: Settings, events: Events, meter: Meter, lock: JobLock
) -> Iterator[None]:
    """Keep state.json, events and meter consistent with the block's end. Raises RestartNeeded for a failed device."""
    chosen = (folder.read_state() or State(state="running", trials=0)).chosen
    file.write()
    wanted = trials_wanted(folder, settings.trials, settings.search.asked_method)
    write_record(folder.state_file, State(state="running", trials=wanted, chosen=chosen))
    events.log_to(folder.events_file)
    key = settings_key(settings)
    events.emit(
        "job_started",
        f"job {file.record.job_id} in {folder.path}",
        versions=file.record.versions,
        settings=key,
        price=settings.price,
    )
    try:
        with meter.running():
            yield
    except Stopped as stop:
        _end(folder, events, "preempted", str(stop))
        raise
    except AcceleratorFaultError as fault:
        faults = _faults_in_a_row(folder)
        _end(folder, events, "failed" if faults >= _MOST_FAULTS else "preempted", fault.line)
        if faults >= _MOST_FAULTS:
            _report(folder, events)
            raise
        events.emit("accelerator_fault", f"{fault}; continuing in a new process")
        raise RestartNeeded from fault
    except JobError as error:
        _end(folder, events, "failed", error.line)
        if isinstance(error, ImpossibleJobError | UsageError) and file.record.resolution is None:
            # Nothing was begun that could be continued.
            events.log_to(None)
            lock.discard()
            folder.discard()
        else:
            _report(folder, events)
        raise
    except Exception as error:
        _end(folder, events, "failed", f"{type(error).__name__}: {error}")
        _report(folder, events)
        raise


def _faults_in_a_row(folder: RunFolder) -> int:
    faults = 0
    for event in read_events(folder.events_file):
        faults = 0 if event.get("event") == "trial" else faults + (event.get("event") == "accelerator_fault")
    return faults


def _end(folder: RunFolder, events: Events, state: str, reason: str) -> None:
    former = folder.read_state()
    assert former is not None
    ended = State.model_validate({**former.model_dump(), "state": state, "reason": reason})
    try:
        write_record(folder.state_file, ended)
        events.emit(f"job_{state}", reason=reason, phase=former.phase)
    except MachineError:
        pass  # a full disk; the user must see the failure itself


def _report(folder: RunFolder, events: Events) -> None:
    try:
        try:
            from job.report.markdown import write_reports  # its study imports slowly

            write_reports(folder)
        except Exception as error:  # must not hide the failure itself
            events.say(f"warning: the report cannot be written: {type(error).__name__}: {error}")
    except MachineError:
        pass  # the disk is full


def settings_key(settings: Settings) -> str:
    """Return a hash that distinguishes settings of starts."""
    return short_hash(settings.model_dump_json())
