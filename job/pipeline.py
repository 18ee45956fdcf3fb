"""The story of a run, top to bottom.

settings → preflight → prompts → model → residuals → directions → search → export → upload → report
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from job.budget import Budget, Meter
from job.errors import (
    AcceleratorFaultError,
    ExportMismatchError,
    ImpossibleJobError,
    JobError,
    MachineError,
    RestartNeeded,
    Stopped,
)
from job.events import Events, read_events
from job.interrupt import StopSignals
from job.models import fetch_model, list_model, parse_model
from job.preflight.checks import is_allowed
from job.preflight.estimate import PHASES, Hours
from job.preflight.readings import MachineReading
from job.preflight.restarts import past_starts
from job.preflight.survey import Survey, Surveyor
from job.prompts import PromptSets
from job.records import Figures, JobRecord, State, Trial
from job.report import write_reports
from job.reproduction import (
    Again,
    Reproduction,
    environment_differences,
    require_same_model,
    require_same_prompts,
)
from job.result import job_trials
from job.search import choose, restore_if_damaged
from job.settings import Settings
from job.upload.targets import deliver_to_all
from job.workspace import (
    REPRODUCE,
    RunFolder,
    find_folder,
    is_sealed,
    open_job,
    read_record,
    write_record,
)

if TYPE_CHECKING:
    from job.workbench import Workbench


# Fresh processes that are tried after the device failed, until a trial succeeds.
_MOST_FAULTS = 3


@dataclass(frozen=True)
class Outcome:
    """What a run came to.

    Attributes:
        folder: The run folder.
        chosen: The exported trial's number.
        base: Figures of the base model on the report split.
        edited: Figures of the export on the report split.
        failed_targets: Targets that could not be delivered to, with the reason.
        missed_gate: Which gate the export missed, so that it was not delivered; None if it missed none.
    """

    folder: RunFolder
    chosen: int
    base: Figures
    edited: Figures
    failed_targets: tuple[tuple[str, str], ...] = ()
    missed_gate: str | None = None


def run(
    settings: Settings,
    *,
    new: bool,
    events: Events,
    signals: StopSignals,
    notes: Sequence[str] = (),
    again: Again | None = None,
) -> Outcome:
    """Do the job that the settings describe, from wherever an earlier run of it has got to.

    Args:
        settings: The settings.
        new: Start a job beside one with other settings.
        events: Where progress goes.
        signals: What stops the run.
        notes: What became of old settings.
        again: An export that is to be made again.

    Raises:
        JobError: The job cannot be done; each kind says whether, where and how it could be.
        Stopped: A signal asked for it; running again continues.
    """

    def opened() -> tuple[RunFolder, JobRecord]:
        folder, record = open_job(settings, new=new, pinned=again.pinned if again else None)
        if again is not None:
            require_same_model(again.original, record.identity)
            write_record(folder.reproduces_file, again.original)
            record = record.model_copy(update=again.resolved)
        return folder, record

    return _run(opened, settings, events, signals, notes)


def resume(folder: RunFolder, settings: Settings, *, events: Events, signals: StopSignals) -> Outcome:
    """Continue a job from its run folder alone; what it was made from need not be where it was named.

    Args:
        folder: The run folder.
        settings: The job's settings, with others that only extend it in their place.
        events: Where progress goes.
        signals: What stops the run.

    Raises:
        JobError: The job cannot be done; each kind says whether, where and how it could be.
        Stopped: A signal asked for it; running again continues.
    """

    def opened() -> tuple[RunFolder, JobRecord]:
        return folder, folder.read_job().model_copy(update={"settings": settings.model_dump(mode="json")})

    return _run(opened, settings, events, signals, ())


def _run(
    opened: Callable[[], tuple[RunFolder, JobRecord]],
    settings: Settings,
    events: Events,
    signals: StopSignals,
    notes: Sequence[str],
) -> Outcome:
    folder, record = opened()
    chosen = _completed_choice(folder, settings)
    if chosen is not None:
        events.emit("job_complete", f"job {record.job_id} is finished; nothing to do")
        return _outcome(folder, chosen, folder.export_folder(chosen, settings.export_format))
    # Before the lock is taken, which writes down this process in place of the one before.
    left_by = folder.holder()
    with folder.held():
        # Read again: another run may have resolved and released the job since.
        folder, record = opened()
        surveyor = surveyor_of(folder, settings, events, notes=notes)
        surveyor.held, surveyor.left_by = None, (left_by.process,) if left_by else ()
        meter = Meter(folder.meter_file, settings.price)
        with _recorded(folder, record, settings, events, meter):
            return _Job(folder, record, settings, events, signals, meter).do(surveyor)


def _completed_choice(folder: RunFolder, settings: Settings) -> int | None:
    """Return the chosen trial if nothing is left to do, else None."""
    state = folder.read_state()
    if state is None or state.state != "finished" or state.chosen is None:
        return None
    if state.trials < settings.trials and not _is_spent(state, settings):
        return None
    export = folder.export_folder(state.chosen, settings.export_format)
    delivered = {item.target for item in folder.read_uploads() if item.state == "done" and item.export == export.name}
    complete = is_sealed(export) and delivered >= set(settings.upload)
    if not complete or missed_gate(settings, read_record(folder.figures_file(export.name), Figures)):
        return None
    return state.chosen


def _is_spent(state: State, settings: Settings) -> bool:
    """Return whether a job was ended by a limit which the settings do not raise."""
    limits = ((state.max_hours, settings.max_hours), (state.max_cost, settings.max_cost))
    return any(before is not None and now is not None and now <= before for before, now in limits)


def missed_gate(settings: Settings, figures: Figures) -> str | None:
    """Return which gate an export's figures miss, None if they pass all."""
    if settings.max_refusals is not None and figures.refusals > settings.max_refusals:
        return f"{figures.refusals} of {figures.bad_prompts} are refused, max_refusals is {settings.max_refusals}"
    if settings.max_kl is not None and (figures.kl is None or not figures.kl <= settings.max_kl):
        return f"the KL divergence is {figures.kl or 0:.4g}, max_kl is {settings.max_kl:g}"
    return None


def _outcome(folder: RunFolder, chosen: int, export: Path) -> Outcome:
    base = read_record(folder.figures_file("base"), Figures)
    return Outcome(folder, chosen, base, read_record(folder.figures_file(export.name), Figures))


@contextmanager
def _recorded(folder: RunFolder, record: JobRecord, settings: Settings, events: Events, meter: Meter) -> Iterator[None]:
    """Keep state.json, the event log and the meter true to how the block ends."""
    chosen = (folder.read_state() or State(state="running", trials=0)).chosen
    write_record(folder.job_file, record)
    write_record(folder.state_file, State(state="running", trials=settings.trials, chosen=chosen))
    events.log_to(folder.events_file)
    key = _settings_key(settings)
    events.emit("job_started", f"job {record.job_id} in {folder.path}", versions=record.versions, settings=key)
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
            raise
        events.emit("accelerator_fault", f"{fault}; going on in a fresh process")
        raise RestartNeeded from fault
    except JobError as error:
        _end(folder, events, "failed", error.line)
        if isinstance(error, ImpossibleJobError) and folder.read_job().resolution is None:
            folder.discard()  # nothing was begun that could be continued
        raise
    except Exception as error:
        _end(folder, events, "failed", f"{type(error).__name__}: {error}")
        raise


def _faults_in_a_row(folder: RunFolder) -> int:
    """Return how often the device has failed since the latest trial."""
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
        pass  # on a full disk nothing can be written down; the failure itself is what the user has to see


class _Job:
    """One start of a job."""

    def __init__(
        self,
        folder: RunFolder,
        record: JobRecord,
        settings: Settings,
        events: Events,
        signals: StopSignals,
        meter: Meter,
    ) -> None:
        self._folder = folder
        self._record = record
        self._settings = settings
        self._events = events
        self._signals = signals
        self._meter = meter

    def do(self, surveyor: Surveyor) -> Outcome:
        """Go through all stages; those that an earlier start has finished are passed over."""
        prompts = surveyor.prompts
        if restored := restore_if_damaged(self._folder.study_file):
            self._events.say(f"warning: {restored}")
        trials = _trials_so_far(self._folder)
        self._say_differences()
        if prompts is None or not self._is_searched_and_exported(trials, prompts):
            # A job of which only the delivery is left has its targets tell what is wrong with them.
            prompts = self._preflight(surveyor)
            trials = self._search_and_export(prompts)
        chosen = self._choice(trials, prompts)
        export = self._export_folder(chosen)
        link_export(self._folder, export)
        self._require_same(export)
        outcome = _outcome(self._folder, chosen.number, export)
        missed = missed_gate(self._settings, outcome.edited)
        if missed is None:
            self._phase("upload")
            failed = deliver_to_all(self._folder, export, self._settings, self._events)
            outcome = replace(outcome, failed_targets=tuple(failed))
        else:
            self._events.emit("gate_missed", f"nothing is delivered: {missed}")
            outcome = replace(outcome, missed_gate=missed)
        write_reports(self._folder)
        write_record(self._folder.state_file, self._finished(chosen, len(trials), missed))
        self._events.emit("job_finished", chosen=chosen.number)
        return outcome

    def _finished(self, chosen: Trial, trials: int, missed: str | None) -> State:
        """Return what state.json says of the finished job."""
        settings = self._settings
        if trials >= settings.trials or not self._record.searches:
            return State(state="finished", reason=missed, trials=settings.trials, chosen=chosen.number)
        return State(
            state="finished",
            reason=missed or "budget",
            trials=trials,
            chosen=chosen.number,
            max_hours=settings.max_hours,
            max_cost=settings.max_cost,
        )

    def _export_folder(self, trial: Trial) -> Path:
        return self._folder.export_folder(trial.number, self._settings.export_format)

    def _original(self) -> Reproduction | None:
        """Return the export that this job makes again, None if it makes none."""
        if self._record.reproduces is None:
            return None
        return read_record(self._folder.reproduces_file, Reproduction)

    def _say_differences(self) -> None:
        original = self._original()
        for line in environment_differences(original, self._record.versions) if original else ():
            self._events.say(f"warning: {line}: the result may differ from the original")

    def _require_same(self, export: Path) -> None:
        """Compare an export with the one that it is to be the same as.

        Raises:
            ExportMismatchError: It is not the same.
        """
        original = self._original()
        if original is None:
            return
        made = read_record(export / REPRODUCE, Reproduction)
        if made.edit != original.edit:
            raise ExportMismatchError(
                f"the search has chosen another edit (trial {made.trial.number}, was {original.trial.number})",
                remedy="see the warnings on versions above",
            )
        differing = [name for name, sha in original.weights.items() if made.weights.get(name) != sha]
        if differing:
            raise ExportMismatchError(
                f"{len(differing)} of {len(original.weights)} files of weights are not the original's: {differing[0]}",
                remedy="the same hardware and the versions named in reproduce.json give the same bytes",
            )
        self._events.emit("reproduced", f"all {len(original.weights)} files of weights equal the original's")

    def _is_searched_and_exported(self, trials: Sequence[Trial], prompts: PromptSets) -> bool:
        enough = not self._record.searches or len(trials) >= self._settings.trials
        return enough and self._is_exported(self._choice(trials, prompts))

    def _search_and_export(self, prompts: PromptSets) -> list[Trial]:
        """Do all that needs the model and return the trials."""
        # torch takes seconds to load and is needed for these stages only.
        from job.workbench import Workbench

        self._phase("model")
        model = model_folder(self._record, self._settings, self._events)
        with Workbench.prepared(self._folder, self._record, self._settings, model, prompts, self._events) as bench:
            trials = self._search(bench) if self._record.searches else _trials_so_far(self._folder)
            chosen = self._choice(trials, prompts)
            if not self._is_exported(chosen):
                self._phase("export")
                original = self._original()
                made = original.trials if original is not None else len(trials)
                bench.export(chosen, made, self._settings.export_format)
        return trials

    def _preflight(self, surveyor: Surveyor) -> PromptSets:
        """Check all that can be checked before anything large is downloaded; return the prompts, pinned."""
        self._phase("preflight")
        survey = surveyor.survey()
        write_record(self._folder.preflight_file, survey)
        for check in survey.checks:
            if check.status != "ok":
                allowed = " (allowed)" if is_allowed(check, survey.allowed) else ""
                self._events.say(f"preflight: {check.status}{allowed}: {check.line}")
        self._events.emit("preflight", f"preflight: {survey.summary}", checks=[c.model_dump() for c in survey.checks])
        survey.require()
        prompts = surveyor.prompts
        if prompts is None:
            raise ImpossibleJobError(
                "the prompts cannot be read, whatever is allowed", remedy="see `abliterate preflight`"
            )
        original = self._original()
        if original is not None:
            require_same_prompts(original, prompts)
        if not self._folder.prompts_file.exists():
            write_record(self._folder.prompts_file, prompts)
            self._events.emit("prompts", received=prompts.received, commits=prompts.commits)
            for check in survey.checks:
                if check.name.startswith("data."):
                    self._events.say(f"{check.name.removeprefix('data.')}: {check.measured}")
        if self._record.model_commit is None and survey.commit is not None:
            pinned = {"model_commit": survey.commit, "model_public": survey.public}
            self._record = self._record.model_copy(update=pinned)
            write_record(self._folder.job_file, self._record)
        return prompts

    def _choice(self, trials: Sequence[Trial], prompts: PromptSets) -> Trial:
        return choose(trials, len(prompts.bad_search), self._settings.choice.refusal_tolerance)

    def _is_exported(self, trial: Trial) -> bool:
        return is_sealed(self._export_folder(trial))

    def _search(self, bench: Workbench) -> list[Trial]:
        """Bring the study to its target and return its trials."""
        self._phase("search")
        target, asked = self._settings.trials, len(bench.prompts.bad_search)
        bench.measure_baseline()
        search = bench.search()
        done = len(search.finished())
        self._events.emit("search_started", f"search: {done} of {target} trials are done", done=done)
        pace = _Pace(
            _budget(self._folder, self._settings, self._meter), self._signals, self._settings.grace, begun=done > 0
        )
        with self._events.progress("trials", target, done) as advance:

            def told(trial: Trial) -> None:
                values = trial.values
                failed = f", failed: {values.reason}" if values.reason else ""
                self._events.emit(
                    "trial",
                    f"trial {trial.number}: {values.refusals}/{asked} refusals, KL {values.kl:.4g}{failed}",
                    number=trial.number,
                    **values.model_dump(),
                )
                advance(1)

            search.run(
                target,
                bench.evaluate,
                told=told,
                shielded=self._signals.shielded,
                batch=pace.batch,
                may_go_on=pace.may_go_on,
            )
        trials = search.finished()
        if len(trials) < target:
            self._events.emit("budget", f"the budget ends the search after {len(trials)} of {target} trials")
        return trials

    def _phase(self, name: str) -> None:
        state = self._folder.read_state()
        assert state is not None
        write_record(self._folder.state_file, state.model_copy(update={"phase": name}))


class _Pace:
    """Times batches, gives a stopped one its grace, and ends the search when the budget asks for it."""

    def __init__(self, budget: Budget, signals: StopSignals, grace: float, *, begun: bool) -> None:
        self._budget = budget
        self._signals = signals
        self._grace = grace
        self._begun = begun
        self._longest = 0.0

    @contextmanager
    def batch(self) -> Iterator[None]:
        begin = time.monotonic()
        with self._signals.graceful(self._grace):
            yield
        self._begun = True
        self._longest = max(self._longest, time.monotonic() - begin)

    def may_go_on(self) -> bool:
        """Return whether another batch fits; the first one of a job is made in any case, or nothing could be chosen."""
        return not self._begun or self._budget.has_room_for(self._longest)


def _budget(folder: RunFolder, settings: Settings, meter: Meter) -> Budget:
    """Return the budget, with what preflight expects of export and delivery held back."""
    hours = Hours(**dict.fromkeys(PHASES, 0.0))
    if folder.preflight_file.exists():
        hours = read_record(folder.preflight_file, Survey).hours or hours
    return Budget(
        meter,
        max_hours=settings.max_hours,
        max_cost=settings.max_cost,
        price=settings.price,
        reserve=hours.export + hours.upload,
    )


def _trials_so_far(folder: RunFolder) -> list[Trial]:
    """Return the finished trials; none of a damaged study, of which the search will tell."""
    try:
        return job_trials(folder)
    except JobError:
        return []


def surveyor_of(
    folder: RunFolder,
    settings: Settings,
    events: Events,
    *,
    notes: Sequence[str] = (),
    on: MachineReading | None = None,
) -> Surveyor:
    """Return what surveys a job, with all that its folder, if it has one yet, tells of earlier starts.

    Args:
        folder: The run folder.
        settings: The settings.
        events: Where what is tried again is told.
        notes: What became of old settings.
        on: A machine to plan for in place of this one.
    """
    surveyor = Surveyor(
        settings=settings, notes=tuple(notes), on=on, settings_key=_settings_key(settings), report=events.say
    )
    if folder.job_file.exists():
        holder = folder.holder()
        surveyor.commit = folder.read_job().model_commit
        surveyor.starts = past_starts(read_events(folder.events_file))
        surveyor.trials_done = len(_trials_so_far(folder))
        if folder.prompts_file.exists():
            surveyor.prompts = read_record(folder.prompts_file, PromptSets)
        if holder is not None and folder.is_held():
            surveyor.held = holder.describe()
        elif holder is not None:
            surveyor.left_by = (holder.process,)
    return surveyor


def _settings_key(settings: Settings) -> str:
    """Return what tells one start's settings from another's."""
    return hashlib.sha256(settings.model_dump_json().encode()).hexdigest()[:12]


def model_folder(record: JobRecord, settings: Settings, events: Events) -> Path:
    """Return the folder with the model's files, downloaded at the pinned commit where they are not there yet."""
    source = parse_model(settings.model)
    if source.kind == "folder":
        return Path(source.name)
    listing = list_model(source, record.model_commit, events.say)
    events.emit("download_started", f"fetching {source.describe()}: {listing.size / 2**30:.1f} GiB in all")
    return fetch_model(source, listing, events.say)


def link_export(folder: RunFolder, export: Path) -> None:
    """Let `export` in the run folder point to an export."""
    target = export.relative_to(folder.path)
    temporary = folder.path / ".export.tmp"
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target)
    temporary.replace(folder.export_link)


def preflight(
    settings: Settings, *, events: Events, notes: Sequence[str] = (), on: MachineReading | None = None
) -> Survey:
    """Survey a job without beginning it; nothing is left behind.

    Args:
        settings: The settings.
        events: Where what is tried again is told.
        notes: What became of old settings.
        on: A machine to plan for in place of this one.

    Raises:
        UsageError: A setting is malformed.
    """
    surveyor = surveyor_of(find_folder(settings), settings, events, notes=notes, on=on)
    surveyor.keep = False
    return surveyor.survey()
