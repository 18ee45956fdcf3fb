"""How a run begins and ends: which job it is, who holds it, what is checked, and what becomes of the machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from job.cloud.end_policy import AskedEnds, Ended
from job.config.schema import Settings
from job.data.prompts import PromptSets
from job.errors import DeliveryError, GateError, RestartNeeded
from job.export.reproduction import Again, require_same_model
from job.lifecycle.end_of_rental import Machine, Progress, end_rental, outcome_of_error
from job.lifecycle.lock import held
from job.lifecycle.outcome import Outcome, completed
from job.lifecycle.running import RunningJob
from job.lifecycle.safekeeping import undelivered
from job.lifecycle.state import recorded, settings_key
from job.mirror.vetting import note_known_code, require_known_code
from job.preflight.inputs import EarlierStarts, JobHolder, PreflightInputs
from job.preflight.readings import MachineReading
from job.preflight.restarts import past_starts
from job.preflight.runner import preflight
from job.preflight.survey import Survey
from job.records import JobRecord
from job.search.budget import Meter
from job.storage.atomic import read_record, sweep_temporaries, write_record
from job.storage.events import Events, read_events
from job.storage.job_file import JobFile
from job.storage.jobs import find_folder, open_job
from job.storage.run_folder import RunFolder
from job.system.lifeline import tell
from job.system.locks import left_behind
from job.system.processes import HolderRecord
from job.system.signals import StopSignals

if TYPE_CHECKING:
    from job.cloud.self_stop import Rental


Stages = Callable[[RunningJob, PreflightInputs], Outcome]


def run(
    settings: Settings,
    *,
    new: bool,
    events: Events,
    signals: StopSignals,
    stages: Stages,
    notes: Sequence[str] = (),
    again: Again | None = None,
) -> Outcome:
    """Do the job that the settings describe, from wherever an earlier run of it has got to.

    Args:
        settings: The settings.
        new: Start a job beside one with other settings.
        events: Where progress goes.
        signals: What stops the run.
        stages: Does the job's stages (`job.pipeline.run`).
        notes: What became of old settings.
        again: An export that is to be made again.

    Raises:
        JobError: The job cannot be done; each kind says whether, where and how it could be.
        Stopped: A signal asked for it; running again continues.
    """
    _tell_asked(settings)
    try:
        start = _begin(settings, new=new, notes=notes, again=again)
    except Exception as error:
        _close(outcome_of_error(error), settings, events)
        raise
    return carry_out(start, events, signals, stages)


def _begin(settings: Settings, *, new: bool, notes: Sequence[str], again: Again | None) -> JobStart:
    """Return the start of the job that the settings describe."""
    pinned = again.pinned if again else None
    folder, first = open_job(settings, new=new, pinned=pinned)

    def opened() -> tuple[JobRecord, Settings]:
        _, record = open_job(settings, new=True, pinned=pinned)
        if again is not None:
            require_same_model(again.original, record.identity)
            write_record(folder.reproduces_file, again.original)
            if again.original.edit.directions is not None and not again.searches:
                from job.directions.learned import import_learned  # loads torch, which takes seconds

                import_learned(folder, again.original.edit, again.folder)
            record = record.model_copy(update=again.resolved)
        return record, settings

    return JobStart(
        folder,
        first.identity,
        settings,
        opened,
        beside_others=new or again is not None,
        names_code=again is not None,
        notes=tuple(notes),
    )


@dataclass(frozen=True)
class JobStart:
    """What a run begins with.

    Attributes:
        folder: The run folder, which may have to be filled from the checkpoint.
        identity: What the job is.
        settings: Where the checkpoint is, and what becomes of the machine.
        opened: Returns job.json and the settings once the run folder is there.
        beside_others: The checkpoint may hold other jobs on the same model.
        names_code: This side names the very commit of the model.
        notes: What became of old settings.
    """

    folder: RunFolder
    identity: Mapping[str, Any]
    settings: Settings
    opened: Callable[[], tuple[JobRecord, Settings]]
    beside_others: bool = True
    names_code: bool = False
    notes: tuple[str, ...] = ()

    def trusted(self, report: Callable[[str], None]) -> tuple[JobRecord, Settings]:
        """Return job.json and the settings once this side is known to name the code that the job runs.

        Args:
            report: Told of every failure of the Hub that is tried again.

        Raises:
            UsageError: Only a checkpoint names it.
            MachineError: The Hub cannot be reached.
        """
        record, settings = self.opened()
        if not self.names_code:
            require_known_code(self.folder, record, settings, report)
        note_known_code(self.folder, record, settings)
        return record, settings


def carry_out(start: JobStart, events: Events, signals: StopSignals, stages: Stages) -> Outcome:
    """Do a job from wherever it has got to, and then with the rented machine what the settings say.

    Args:
        start: What to begin with.
        events: Where progress goes.
        signals: What stops the run.
        stages: Does the job's stages (`job.pipeline.run`).

    Raises:
        JobError: The job cannot be done; each kind says whether, where and how it could be.
        Stopped: A signal asked for it; running again continues.
        RestartNeeded: The device has failed, and a fresh process may succeed.
    """
    settings = start.settings
    tell(job=str(start.folder.path.absolute()))
    _tell_asked(settings)
    events.listen(Progress(Path(settings.workspace), start.folder))
    try:
        outcome = _run(start, events, signals, stages)
    except RestartNeeded:
        raise
    except Exception as error:  # whatever it is goes on to the caller; the machine is not to bill on because of it
        _close(outcome_of_error(error), settings, events, start.folder)
        raise
    code = GateError.exit_code if outcome.missed_gate else DeliveryError.exit_code if outcome.failed_targets else 0
    _close(Ended(code), settings, events, start.folder)
    return outcome


def _tell_asked(settings: Settings) -> None:
    """Have the supervisor know what is asked for, now that the settings are read as a whole."""
    tell(workspace=str(Path(settings.workspace).absolute()), when_failed=settings.when_failed)


def _close(outcome: Ended, settings: Settings, events: Events, folder: RunFolder | None = None) -> None:
    """End the rental as is asked for and safe."""
    events.log_to(None)  # the last snapshot has been taken: what is logged now would be missing there
    asked = AskedEnds(settings.when_done, settings.when_failed)
    end_rental(outcome, asked, Machine(Path(settings.workspace), folder, settings), events.say)


def _this_rental() -> Rental | None:
    from job.cloud.self_stop import find_rental

    return find_rental()


def _run(start: JobStart, events: Events, signals: StopSignals, stages: Stages) -> Outcome:
    folder = start.folder
    done = _completed(start, events)
    if done is not None:
        return done
    # Before the lock is taken, which writes down this process in place of the one before.
    left_by = folder.holder()
    with held(folder, start.identity, start.settings, events, signals, beside_others=start.beside_others) as lock:
        # Again: another run may have finished it since, here or elsewhere.
        done = _completed(start, events)
        if done is not None:
            return done
        record, settings = start.trusted(events.say)
        inputs = preflight_inputs(folder, settings, events, notes=start.notes, last_holder=left_by, starting=True)
        settings, file = inputs.settings, JobFile(folder, record)
        meter = Meter(folder.meter_file, settings.price)
        with recorded(folder, file, settings, events, meter, lock):
            return stages(RunningJob(folder, file, settings, events, signals, meter, lock), inputs)


def _completed(start: JobStart, events: Events) -> Outcome | None:
    """Return what the job came to if it is complete, and say so."""
    if not start.folder.job_file.exists():
        return None
    record, settings = start.opened()
    done = completed(start.folder, settings)
    if done is not None:
        sweep_temporaries(start.folder.path, time.time(), below=True)  # nobody will come to hold it
        events.emit("job_complete", f"job {record.job_id} is finished; nothing to do")
    return done


def _priced(settings: Settings, rental: Rental | None) -> Settings:
    """Return the settings with the price that the platform bills, where none is given."""
    if settings.price is not None or rental is None:
        return settings
    return settings.model_copy(update={"price": rental.price()})


def preflight_inputs(
    folder: RunFolder,
    settings: Settings,
    events: Events,
    *,
    notes: Sequence[str] = (),
    on: MachineReading | None = None,
    last_holder: HolderRecord | None,
    starting: bool,
) -> PreflightInputs:
    """Return what preflight works on, with all that the run folder tells of earlier starts.

    Args:
        folder: The run folder, which need not exist yet.
        settings: The settings.
        events: Told of retries.
        notes: What became of old settings.
        on: A machine to plan for in place of this one.
        last_holder: Who holds the job, or held it before this run.
        starting: This run holds the job; otherwise the job is only checked, and nothing may be left behind.
    """
    rental = _this_rental() if on is None else None
    held = last_holder is not None and not starting and folder.is_held()
    return PreflightInputs(
        settings=_priced(settings, rental),
        notes=tuple(notes),
        on=on,
        settings_key=settings_key(settings),
        earlier=_earlier_starts(folder, None if held else last_holder),
        holder=_described(last_holder, folder) if last_holder is not None and held else None,
        lease=folder.path.name if not starting and settings.checkpoint is not None else None,
        rental=rental,
        undelivered=_undelivered(folder, settings) if on is None else "",
        upload_state=folder.uploads_state if starting else None,
        keep_downloads=starting,
        report=events.say,
    )


def _undelivered(folder: RunFolder, settings: Settings) -> str:
    """Return which other job of the workspace keeps this machine from being ended, "" if none does."""
    if {settings.when_done, settings.when_failed} == {"nothing"}:
        return ""
    return undelivered(Path(settings.workspace), folder)


def _earlier_starts(folder: RunFolder, last_holder: HolderRecord | None) -> EarlierStarts:
    processes = (last_holder.process,) if last_holder is not None else ()
    if not folder.job_file.exists():
        return EarlierStarts(processes=processes)
    from job.report.results import trials_so_far  # takes longer to load than all that a finished job needs

    record = folder.read_job()
    return EarlierStarts(
        prompts=read_record(folder.prompts_file, PromptSets) if folder.prompts_file.exists() else None,
        commit=record.model_commit,
        date=record.prompt_date,
        starts=past_starts(read_events(folder.events_file)),
        processes=processes,
        trials_done=len(trials_so_far(folder)),
    )


def _described(holder: HolderRecord, folder: RunFolder) -> JobHolder:
    left = left_behind(folder.lock_file)
    return JobHolder(holder.describe()) if left is None else JobHolder(holder.describe(), left.remedy)


def check_job(
    settings: Settings, *, events: Events, notes: Sequence[str] = (), on: MachineReading | None = None
) -> Survey:
    """Check a job without starting it; nothing is left behind.

    Args:
        settings: The settings.
        events: Told of retries.
        notes: What became of old settings.
        on: A machine to plan for in place of this one.

    Raises:
        UsageError: A setting is malformed, or code would be run that only a checkpoint names.
    """
    folder = find_folder(settings)
    if folder.job_file.exists():
        require_known_code(folder, folder.read_job(), settings, events.say)
    last_holder = folder.holder() if folder.job_file.exists() else None
    inputs = preflight_inputs(folder, settings, events, notes=notes, on=on, last_holder=last_holder, starting=False)
    return preflight(inputs).survey
