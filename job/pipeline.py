"""The story of a run, top to bottom.

settings → preflight → prompts → model → residuals → directions → search → export → upload → report
"""

from __future__ import annotations

import hashlib
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from job.budget import Budget, Meter
from job.errors import ExportMismatchError, HeldError, ImpossibleJobError, JobError, RestartNeeded
from job.events import Events, read_events
from job.holding import Hold, held
from job.interrupt import StopSignals
from job.models import fetch_model, list_model, parse_model
from job.outcome import Outcome, completed, missed_gate, outcome_of
from job.preflight.checks import is_allowed
from job.preflight.estimate import PHASES, Hours
from job.preflight.mounts import kind_of, mount_of, read_mounts
from job.preflight.readings import MachineReading
from job.preflight.restarts import past_starts
from job.preflight.survey import Survey, Surveyor
from job.prompts import PromptSets
from job.recording import recorded, settings_key
from job.records import JobRecord, State, Trial
from job.report import write_reports
from job.reproduction import (
    Again,
    Reproduction,
    environment_differences,
    require_same_model,
    require_same_prompts,
)
from job.result import job_trials
from job.search import back_up, choose, restore_if_damaged
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
    from job.cloud.rental import Rental
    from job.workbench import Workbench


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
    pinned = again.pinned if again else None
    folder, first = open_job(settings, new=new, pinned=pinned)

    def opened() -> tuple[JobRecord, Settings]:
        _, record = open_job(settings, new=True, pinned=pinned)
        if again is not None:
            require_same_model(again.original, record.identity)
            write_record(folder.reproduces_file, again.original)
            record = record.model_copy(update=again.resolved)
        return record, settings

    start = Start(folder, first.identity, settings, opened, beside_others=new or again is not None, notes=tuple(notes))
    return carry_out(start, events, signals)


@dataclass(frozen=True)
class Start:
    """What a run begins with.

    Attributes:
        folder: The run folder, which may have to be filled from the checkpoint.
        identity: What the job is.
        settings: Where the checkpoint is, and what becomes of the machine.
        opened: Returns job.json and the settings once the run folder is there.
        beside_others: The checkpoint may hold other jobs on the same model.
        notes: What became of old settings.
    """

    folder: RunFolder
    identity: Mapping[str, Any]
    settings: Settings
    opened: Callable[[], tuple[JobRecord, Settings]]
    beside_others: bool = True
    notes: tuple[str, ...] = ()


def carry_out(start: Start, events: Events, signals: StopSignals) -> Outcome:
    """Do a job from wherever it has got to, and then with the rented machine what the settings say.

    Args:
        start: What to begin with.
        events: Where progress goes.
        signals: What stops the run.

    Raises:
        JobError: The job cannot be done; each kind says whether, where and how it could be.
        Stopped: A signal asked for it; running again continues.
        RestartNeeded: The device has failed, and a fresh process may succeed.
    """
    settings = start.settings
    try:
        outcome = _run(start, events, signals)
    except HeldError as error:
        # A machine that comes back after another has taken over must not be paid for any longer.
        if error.elsewhere:
            end_rental(settings.when_done, settings, events)
        raise
    except RestartNeeded:
        raise
    except Exception:
        end_rental(settings.when_failed, settings, events)
        raise
    delivered = not outcome.failed_targets and outcome.missed_gate is None
    end_rental(settings.when_done if delivered else settings.when_failed, settings, events)
    return outcome


def end_rental(action: Literal["nothing", "stop", "destroy"], settings: Settings, events: Events) -> None:
    """End the rental of this machine, if it is one and that is asked for."""
    if action == "nothing":
        return
    rental = _this_rental()
    if rental is None:
        events.emit("rental", f"warning: this is no rented machine that is known: it is not ended ({action})")
    else:
        rental.end(action, Path(settings.workspace), events.say)


def _this_rental() -> Rental | None:
    from job.cloud.rental import find_rental

    return find_rental()


def _run(start: Start, events: Events, signals: StopSignals) -> Outcome:
    folder = start.folder
    done = _completed(start, events)
    if done is not None:
        return done
    # Before the lock is taken, which writes down this process in place of the one before.
    left_by = folder.holder()
    with held(folder, start.identity, start.settings, events, signals, beside_others=start.beside_others) as hold:
        # Again: another run may have finished it since, here or elsewhere.
        done = _completed(start, events)
        if done is not None:
            return done
        record, settings = start.opened()
        surveyor = surveyor_of(folder, settings, events, notes=start.notes)
        surveyor.held, surveyor.left_by = None, (left_by.process,) if left_by else ()
        surveyor.uploads, settings = folder.uploads_state, surveyor.settings
        meter = Meter(folder.meter_file, settings.price)
        with recorded(folder, record, settings, events, meter, hold):
            return _Job(folder, record, settings, events, signals, meter, hold).do(surveyor)


def _completed(start: Start, events: Events) -> Outcome | None:
    """Return what the job came to if it is complete, and say so."""
    if not start.folder.job_file.exists():
        return None
    record, settings = start.opened()
    done = completed(start.folder, settings)
    if done is not None:
        events.emit("job_complete", f"job {record.job_id} is finished; nothing to do")
    return done


def _priced(settings: Settings, rental: Rental | None) -> Settings:
    """Return the settings with the price that the platform bills, where none is given."""
    if settings.price is not None or rental is None:
        return settings
    return settings.model_copy(update={"price": rental.price()})


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
        hold: Hold,
    ) -> None:
        self._hold = hold
        self._folder = folder
        self._record = record
        self._settings = settings
        self._events = events
        self._signals = signals
        self._meter = meter

    def do(self, surveyor: Surveyor) -> Outcome:
        """Go through all stages; those that an earlier start has finished are passed over."""
        prompts = surveyor.prompts
        damage = self._repair()
        trials = _trials_so_far(self._folder)
        self._say_differences()
        if prompts is None or not self._is_searched_and_exported(trials, prompts):
            # A job of which only the delivery is left has its targets tell what is wrong with them.
            prompts = self._preflight(surveyor)
            if damage is not None:
                raise damage  # after preflight, which ends a loop of such starts
            trials = self._search_and_export(prompts)
        chosen = self._choice(trials, prompts)
        export = self._export_folder(chosen)
        link_export(self._folder, export)
        self._require_same(export)
        outcome = outcome_of(self._folder, chosen.number, export)
        missed = missed_gate(self._settings, outcome.edited)
        if missed is None:
            self._phase("upload")
            outcome = replace(outcome, failed_targets=tuple(self._deliver(export)))
        else:
            self._events.emit("gate_missed", f"nothing is delivered: {missed}")
            outcome = replace(outcome, missed_gate=missed)
        write_reports(self._folder)
        write_record(self._folder.state_file, self._finished(chosen, len(trials), missed))
        self._events.emit("job_finished", chosen=chosen.number)
        return outcome

    def _repair(self) -> JobError | None:
        """Restore a study that the disk has damaged; return why it cannot be."""
        try:
            if restored := restore_if_damaged(self._folder.study_file):
                self._events.say(f"warning: {restored}")
        except JobError as error:
            return error
        return None

    def _deliver(self, export: Path) -> list[tuple[str, str]]:
        """Deliver to all targets and return those that failed, with the reason."""
        if not self._settings.upload:
            return []  # nobody sees anything, so a lease that may have expired is no hindrance
        with self._hold.outward():
            return deliver_to_all(self._folder, export, self._settings, self._events)

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
        self._pin(survey)
        return prompts

    def _pin(self, survey: Survey) -> None:
        """Keep what is resolved at the first start and never again."""
        pinned: dict[str, Any] = {}
        if self._record.model_commit is None and survey.commit is not None:
            pinned = {"model_commit": survey.commit, "model_public": survey.public}
        if self._record.planned_rows is None and survey.plan is not None:
            pinned["planned_rows"] = survey.plan.rows
        if pinned:
            self._record = self._record.model_copy(update=pinned)
            write_record(self._folder.job_file, self._record)

    def _choice(self, trials: Sequence[Trial], prompts: PromptSets) -> Trial:
        return choose(trials, len(prompts.bad_search), self._settings.choice.refusal_tolerance)

    def _is_exported(self, trial: Trial) -> bool:
        return is_sealed(self._export_folder(trial))

    def _search(self, bench: Workbench) -> list[Trial]:
        """Bring the study to its target and return its trials."""
        self._phase("search")
        target, asked = self._settings.trials, len(bench.prompts.bad_search)
        bench.measure_baseline()
        search = bench.search(*self._study_place())
        done = len(search.finished())
        self._events.emit("search_started", f"search: {done} of {target} trials are done", done=done)
        budget = _budget(self._folder, self._settings, self._meter)
        pace = _Pace(budget, self._hold, self._signals, self._settings.grace, begun=done > 0)
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

    def _study_place(self) -> tuple[Path, Path | None]:
        """Return where the study is kept while it is searched, and where it is copied to after every batch.

        SQLite needs locks and writes in the middle of files, which network file systems and object stores do not give
        reliably: there the study is on this machine's own disk, and the workspace has a copy that is always whole.
        """
        where, study = self._settings.study_storage, self._folder.study_file
        remote = kind_of(mount_of(self._folder.path, read_mounts())) in ("network", "object-store")
        if where == "workspace" or (where == "auto" and not remote):
            return study, None
        name = hashlib.sha256(str(self._folder.path.resolve()).encode()).hexdigest()[:16]
        live = Path(tempfile.gettempdir()) / f"abliterate-{name}" / study.name
        live.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        for left in live.parent.glob("study.db*"):
            left.unlink()  # of an earlier start, which may have been this far on another machine since
        if study.exists():
            back_up(study, live)
        return live, study

    def _phase(self, name: str) -> None:
        state = self._folder.read_state()
        assert state is not None
        write_record(self._folder.state_file, state.model_copy(update={"phase": name}))
        if self._folder.prompts_file.exists():  # before, there is nothing that another machine could go on from
            self._hold.keep()


class _Pace:
    """Times batches, keeps each, gives a stopped one its grace, and ends the search when the budget asks for it."""

    def __init__(self, budget: Budget, hold: Hold, signals: StopSignals, grace: float, *, begun: bool) -> None:
        self._budget = budget
        self._hold = hold
        self._signals = signals
        self._grace = grace
        self._begun = begun
        self._longest = 0.0

    @contextmanager
    def batch(self) -> Iterator[None]:
        """Time a batch; its block may end by itself within the grace after a stop."""
        begin = time.monotonic()
        with self._signals.graceful(self._grace):
            yield
        self._begun = True
        self._longest = max(self._longest, time.monotonic() - begin)
        self._hold.keep()

    def may_go_on(self) -> bool:
        """Return whether another batch fits; the first one of a job is made in any case, or nothing could be chosen.

        Raises:
            HeldError: Another run has taken the job over.
        """
        self._hold.check()
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
        settings=settings, notes=tuple(notes), on=on, settings_key=settings_key(settings), report=events.say
    )
    if on is None:
        surveyor.rental = _this_rental()
        surveyor.settings = _priced(settings, surveyor.rental)
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
    folder = find_folder(settings)
    surveyor = surveyor_of(folder, settings, events, notes=notes, on=on)
    surveyor.keep = False
    if settings.checkpoint is not None:
        surveyor.leased = folder.path.name
    return surveyor.survey()
