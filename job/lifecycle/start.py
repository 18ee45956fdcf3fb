"""Begin and end a run: identify, hold and check the job, then end the rental."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from job.cloud.end_policy import AskedEnds, Ended
from job.config.checks import require_scorers
from job.config.schema import Settings
from job.data.prompts import PromptSets
from job.errors import DamagedError, DeliveryError, GateError, JobError, RestartNeeded
from job.export.reproduction import Again, require_same_model
from job.lifecycle.end_of_rental import Machine, Progress, end_rental, outcome_of_error
from job.lifecycle.lock import held
from job.lifecycle.outcome import Outcome, completed, left_to_do
from job.lifecycle.running import RunningJob
from job.lifecycle.safekeeping import undelivered
from job.lifecycle.state import recorded, settings_key
from job.mirror.vetting import note_known_code, require_known_code
from job.preflight.checks import Check, attempt
from job.preflight.inputs import EarlierStarts, JobHolder, PreflightInputs
from job.preflight.readings import MachineReading
from job.preflight.restarts import past_starts
from job.preflight.runner import preflight
from job.preflight.survey import Survey
from job.records import JobRecord
from job.search.budget import Meter
from job.search.method import planned_method, trials_wanted
from job.storage.atomic import read_record, sweep_temporaries, write_record
from job.storage.events import Events, read_events
from job.storage.identity import require_same_scorers
from job.storage.job_file import JobFile
from job.storage.jobs import find_folder, open_job
from job.storage.run_folder import RunFolder
from job.storage.study_file import restore_if_damaged
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
    """Run the settings' job from where an earlier run stopped. Raises JobError or Stopped.

    `new` allows a job beside one with other settings; `again` is an export to reproduce.
    """
    _tell_asked(settings)
    try:
        start = _begin(settings, new=new, notes=notes, again=again)
    except Exception as error:
        _close(outcome_of_error(error), settings, events)
        raise
    return carry_out(start, events, signals, stages)


def _begin(settings: Settings, *, new: bool, notes: Sequence[str], again: Again | None) -> JobStart:
    pinned = again.pinned if again else None
    folder, first = open_job(settings, new=new, pinned=pinned)

    def opened() -> tuple[JobRecord, Settings]:
        _, record = open_job(settings, new=True, pinned=pinned)
        if again is not None:
            require_same_model(again.original, record.identity)
            write_record(folder.reproduces_file, again.original)
            if again.original.edit.directions is not None and not again.searches:
                from job.directions.learned import import_learned  # imports torch, which takes seconds

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
    """The start of a run.

    Attributes:
        folder: The run folder, possibly still to be filled from the checkpoint.
        settings: Settings of the checkpoint and of the rental's end.
        opened: Returns job.json and settings once the run folder exists.
        beside_others: The checkpoint may hold other jobs on the same model.
        names_code: This side names the model's exact commit.
    """

    folder: RunFolder
    identity: Mapping[str, Any]
    settings: Settings
    opened: Callable[[], tuple[JobRecord, Settings]]
    beside_others: bool = True
    names_code: bool = False
    notes: tuple[str, ...] = ()

    def trusted(self, report: Callable[[str], None]) -> tuple[JobRecord, Settings]:
        """Return job.json and settings. Raises UsageError if only a checkpoint names their code, or MachineError."""
        record, settings = self.opened()
        if not self.names_code:
            require_known_code(self.folder, record, settings, report)
        note_known_code(self.folder, record, settings)
        return record, settings


def carry_out(start: JobStart, events: Events, signals: StopSignals, stages: Stages) -> Outcome:
    """Run a job from where it stopped, then end the rental. Raises JobError, Stopped or RestartNeeded."""
    settings = start.settings
    tell(job=str(start.folder.path.absolute()))
    _tell_asked(settings)
    events.listen(Progress(Path(settings.workspace), start.folder))
    try:
        outcome = _run(start, events, signals, stages)
    except RestartNeeded:
        raise
    except Exception as error:  # re-raised for the caller; the machine must not bill on because of it
        _close(outcome_of_error(error), settings, events, start.folder)
        raise
    code = GateError.exit_code if outcome.missed_gate else DeliveryError.exit_code if outcome.failed_targets else 0
    _close(Ended(code), settings, events, start.folder)
    return outcome


def _tell_asked(settings: Settings) -> None:
    """Report the fully parsed settings to the supervisor."""
    tell(workspace=str(Path(settings.workspace).absolute()), when_failed=settings.when_failed)


def _close(outcome: Ended, settings: Settings, events: Events, folder: RunFolder | None = None) -> None:
    events.log_to(None)  # after the last snapshot: later entries would be missing there
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
    # Before taking the lock, which replaces the record of the previous process.
    left_by = folder.holder()
    with held(folder, start.identity, start.settings, events, signals, beside_others=start.beside_others) as lock:
        # Checked again: another run may have finished it since, here or elsewhere.
        done = _completed(start, events)
        if done is not None:
            return done
        record, settings = start.trusted(events.say)
        settings = as_begun(record, settings)
        if left := left_to_do(folder, settings):
            events.say(f"job {record.job_id} has finished before: {left}")
        if record.searches:
            require_scorers(settings)
            require_same_scorers(record.identity, settings)
        from job.lifecycle.repair import repair  # imports slowly, and a finished job does not need it

        repair(folder, events.say)
        inputs = preflight_inputs(folder, settings, events, notes=start.notes, last_holder=left_by, starting=True)
        settings, file = inputs.settings, JobFile(folder, record)
        meter = Meter(folder.meter_file, settings.price)
        with recorded(folder, file, settings, events, meter, lock):
            return stages(RunningJob(folder, file, settings, events, signals, meter, lock), inputs)


def as_begun(record: JobRecord, settings: Settings) -> Settings:
    """Return settings that hold out no prompts for the choice where a former version began the job with all."""
    if record.resolution is None or record.resolution.choice is not None:
        return settings
    return settings.model_copy(update={"choice": settings.choice.model_copy(update={"held_out": 0.0})})


def _completed(start: JobStart, events: Events) -> Outcome | None:
    if not start.folder.job_file.exists():
        return None
    record, settings = start.opened()
    done = completed(start.folder, settings)
    if done is not None:
        sweep_temporaries(start.folder.path, time.time(), below=True)  # no run will hold it again
        try:
            if restored := restore_if_damaged(start.folder.study_file):  # for `front`, `export` and more trials
                events.say(f"warning: {restored}")
        except JobError as error:
            events.say(f"warning: {error}")
        events.emit("job_complete", f"job {record.job_id} is finished; nothing to do")
    return done


def _priced(settings: Settings, rental: Rental | None) -> Settings:
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
    """Return preflight's inputs with earlier starts; only a `starting` run may leave anything behind."""
    rental = _this_rental() if on is None else None
    held = last_holder is not None and not starting and folder.is_held()
    return PreflightInputs(
        settings=_priced(settings, rental),
        notes=tuple(notes),
        on=on,
        settings_key=settings_key(settings),
        earlier=_earlier_starts(folder, settings, None if held else last_holder),
        holder=_described(last_holder, folder) if last_holder is not None and held else None,
        lease=folder.path.name if not starting and settings.checkpoint is not None else None,
        rental=rental,
        undelivered=_undelivered(folder, settings) if on is None else "",
        upload_state=folder.uploads_state if starting else None,
        keep_downloads=starting,
        report=events.say,
    )


def _undelivered(folder: RunFolder, settings: Settings) -> str:
    """Return another job of the workspace that keeps this machine from being ended, or ""."""
    if {settings.when_done, settings.when_failed} == {"nothing"}:
        return ""
    return undelivered(Path(settings.workspace), folder)


def _earlier_starts(folder: RunFolder, settings: Settings, last_holder: HolderRecord | None) -> EarlierStarts:
    processes = (last_holder.process,) if last_holder is not None and not last_holder.released else ()
    if not folder.job_file.exists():
        return EarlierStarts(processes=processes)
    from job.report.results import trials_so_far  # imports slowly, and a finished job does not need it

    record, trials, asked = folder.read_job(), trials_so_far(folder), settings.search.asked_method
    return EarlierStarts(
        prompts=read_record(folder.prompts_file, PromptSets) if folder.prompts_file.exists() else None,
        commit=record.model_commit,
        date=record.prompt_date,
        starts=past_starts(_readable_events(folder)),
        processes=processes,
        trials_done=len(trials),
        trials_wanted=trials_wanted(folder, settings.trials, asked),
        path_found=bool(trials) or folder.path_file.exists() or planned_method(record, asked) == "tpe",
    )


def _readable_events(folder: RunFolder) -> Sequence[Mapping[str, Any]]:
    try:
        return read_events(folder.events_file)
    except DamagedError:
        return ()  # a run that has to write there says so


def _described(holder: HolderRecord, folder: RunFolder) -> JobHolder:
    left = left_behind(folder.lock_file)
    return JobHolder(holder.describe()) if left is None else JobHolder(holder.describe(), left.remedy)


def check_job(
    settings: Settings, *, events: Events, notes: Sequence[str] = (), on: MachineReading | None = None
) -> Survey:
    """Check a job without starting it, leaving nothing behind. Raises UsageError.

    A run folder that cannot be used, as while another program holds its study, is the one check of its survey.
    """

    def survey() -> Survey:
        require_scorers(settings)
        folder = find_folder(settings)
        if folder.job_file.exists():
            require_known_code(folder, folder.read_job(), settings, events.say)
            if completed(folder, settings) is None:
                from job.lifecycle.repair import require_usable  # imports slowly

                require_usable(folder, mirrored=settings.checkpoint is not None)
            else:
                read_events(folder.events_file)  # a run prints the result from them
                events.say(f"job {folder.path.name} is finished; a run has nothing to do")
        last_holder = folder.holder() if folder.job_file.exists() else None
        inputs = preflight_inputs(folder, settings, events, notes=notes, on=on, last_holder=last_holder, starting=False)
        return preflight(inputs).survey

    found = attempt("job", survey)
    return Survey(checks=(found,)) if isinstance(found, Check) else found
