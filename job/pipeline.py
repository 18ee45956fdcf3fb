"""The story of a run, top to bottom.

settings → preflight → prompts → model → residuals → directions → search → export → upload → report
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from job.errors import DeliveryError, ImpossibleJobError, JobError, Stopped, UsageError
from job.events import Events
from job.interrupt import StopSignals
from job.prompts import PromptSets, pinned_prompts
from job.records import Figures, JobRecord, State, Trial, Upload
from job.report import write_reports
from job.search import choose, read_trials
from job.settings import Settings
from job.upload.local import deliver
from job.workspace import (
    RunFolder,
    is_sealed,
    model_identity,
    open_job,
    read_record,
    write_record,
)

if TYPE_CHECKING:
    from job.workbench import Workbench


@dataclass(frozen=True)
class Outcome:
    """What a run came to.

    Attributes:
        folder: The run folder.
        chosen: The exported trial's number.
        base: Figures of the base model on the report split.
        edited: Figures of the export on the report split.
        failed_targets: Targets that could not be delivered to, with the reason.
    """

    folder: RunFolder
    chosen: int
    base: Figures
    edited: Figures
    failed_targets: tuple[tuple[str, str], ...] = ()


def run(settings: Settings, *, new: bool, events: Events, signals: StopSignals) -> Outcome:
    """Do the job that the settings describe, from wherever an earlier run of it has got to.

    Raises:
        JobError: The job cannot be done; each kind says whether, where and how it could be.
        Stopped: A signal asked for it; running again continues.
    """
    folder, record = open_job(settings, new=new)
    chosen = _completed_choice(folder, settings)
    if chosen is not None:
        events.emit("job_complete", f"job {record.job_id} is finished; nothing to do")
        return _outcome(folder, chosen)
    with folder.held():
        # Read again: another run may have resolved and released the job since.
        folder, record = open_job(settings, new=new)
        with _recorded(folder, record, settings, events):
            return _Job(folder, record, settings, events, signals).do()


def _completed_choice(folder: RunFolder, settings: Settings) -> int | None:
    """Return the chosen trial if nothing is left to do, else None."""
    state = folder.read_state()
    if state is None or state.state != "finished" or state.chosen is None or state.trials < settings.trials:
        return None
    export = folder.export_folder(state.chosen)
    delivered = {item.target for item in folder.read_uploads() if item.state == "done" and item.export == export.name}
    complete = is_sealed(export) and delivered >= set(settings.upload)
    return state.chosen if complete else None


def _outcome(folder: RunFolder, chosen: int, failed: Sequence[tuple[str, str]] = ()) -> Outcome:
    base = read_record(folder.figures_file("base"), Figures)
    edited = read_record(folder.figures_file(folder.export_folder(chosen).name), Figures)
    return Outcome(folder, chosen, base, edited, tuple(failed))


@contextmanager
def _recorded(folder: RunFolder, record: JobRecord, settings: Settings, events: Events) -> Iterator[None]:
    """Keep state.json and the event log true to how the block ends."""
    chosen = (folder.read_state() or State(state="running", trials=0)).chosen
    write_record(folder.job_file, record)
    write_record(folder.state_file, State(state="running", trials=settings.trials, chosen=chosen))
    events.log_to(folder.events_file)
    events.emit("job_started", f"job {record.job_id} in {folder.path}", versions=record.versions)
    try:
        yield
    except Stopped as stop:
        _end(folder, events, "preempted", str(stop))
        raise
    except JobError as error:
        _end(folder, events, "failed", error.line)
        if isinstance(error, ImpossibleJobError) and folder.read_job().resolution is None:
            folder.discard()  # nothing was begun that could be continued
        raise
    except Exception as error:
        _end(folder, events, "failed", f"{type(error).__name__}: {error}")
        raise


def _end(folder: RunFolder, events: Events, state: str, reason: str) -> None:
    former = folder.read_state()
    assert former is not None
    events.emit(f"job_{state}", reason=reason)
    ended = State.model_validate({**former.model_dump(), "state": state, "reason": reason})
    write_record(folder.state_file, ended)


class _Job:
    """One start of a job."""

    def __init__(
        self, folder: RunFolder, record: JobRecord, settings: Settings, events: Events, signals: StopSignals
    ) -> None:
        self._folder = folder
        self._record = record
        self._settings = settings
        self._events = events
        self._signals = signals

    def do(self) -> Outcome:
        """Go through all stages; those that an earlier start has finished are passed over."""
        self._phase("prompts")
        prompts = pinned_prompts(self._folder, self._settings, self._events.say)
        self._events.emit("prompts", received=prompts.received, commits=prompts.commits)
        trials = read_trials(self._folder.study_file)
        if len(trials) < self._settings.trials or not self._is_exported(self._choice(trials, prompts)):
            # torch takes seconds to load and is needed for these stages only.
            from job.workbench import Workbench

            with Workbench.prepared(self._folder, self._record, self._settings, prompts, self._events) as bench:
                trials = self._search(bench)
                chosen = self._choice(trials, prompts)
                if not self._is_exported(chosen):
                    bench.export(chosen)
        chosen = self._choice(trials, prompts)
        link_export(self._folder, chosen.number)
        failed = self._deliver(self._folder.export_folder(chosen.number))
        outcome = _outcome(self._folder, chosen.number, failed)
        write_reports(self._folder)
        finished = State(state="finished", trials=self._settings.trials, chosen=chosen.number)
        write_record(self._folder.state_file, finished)
        self._events.emit("job_finished", chosen=chosen.number)
        return outcome

    def _choice(self, trials: Sequence[Trial], prompts: PromptSets) -> Trial:
        return choose(trials, len(prompts.bad_search), self._settings.choice.refusal_tolerance)

    def _is_exported(self, trial: Trial) -> bool:
        return is_sealed(self._folder.export_folder(trial.number))

    def _search(self, bench: Workbench) -> list[Trial]:
        """Bring the study to its target and return its trials."""
        self._phase("search")
        target = self._settings.trials
        bench.measure_baseline()
        search = bench.search()
        done = len(search.finished())
        self._events.emit("search_started", f"search: {done} of {target} trials are done", done=done)
        with self._events.progress("trials", target, done) as advance:

            def told(trial: Trial) -> None:
                values = trial.values
                failed = f", failed: {values.reason}" if values.reason else ""
                self._events.emit(
                    "trial",
                    f"trial {trial.number}: {values.refusals} refusals, KL {values.kl:.4g}{failed}",
                    number=trial.number,
                    **values.model_dump(),
                )
                advance(1)

            search.run(target, bench.evaluate, shielded=self._signals.shielded, told=told)
        return search.finished()

    def _deliver(self, export: Path) -> list[tuple[str, str]]:
        """Deliver to every target and return those that failed, with the reason."""
        self._phase("upload")
        failed = []
        for target in self._settings.upload:
            self._events.emit("delivery_started", f"delivering to {target}", target=target)
            try:
                deliver(export, target)
            except DeliveryError as error:
                failed.append((target, error.line))
                upload = Upload(target=target, export=export.name, state="failed", error=error.line)
            else:
                upload = Upload(target=target, export=export.name, state="done")
            self._folder.record_upload(upload)
            self._events.emit("delivery", f"delivery to {target}: {upload.state}", **upload.model_dump())
        return failed

    def _phase(self, name: str) -> None:
        state = self._folder.read_state()
        assert state is not None
        write_record(self._folder.state_file, state.model_copy(update={"phase": name}))


def link_export(folder: RunFolder, trial: int) -> None:
    """Let `export` in the run folder point to a trial's export."""
    target = folder.export_folder(trial).relative_to(folder.path)
    temporary = folder.path / ".export.tmp"
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target)
    temporary.replace(folder.export_link)


def export_trial(folder: RunFolder, number: int | None, events: Events) -> Path:
    """Export a trial of a job beside what it has exported, from its run folder alone.

    Args:
        folder: The run folder.
        number: The trial; None for the one that the job would choose.
        events: Where progress goes.

    Returns:
        The folder of the export.

    Raises:
        UsageError: There is no such trial.
    """
    record = folder.read_job()
    settings = Settings(**{**record.settings, "workspace": str(folder.path.parent)})
    if model_identity(settings) != record.identity["model"]:
        raise UsageError(
            f"the model of job {record.job_id} is no longer what it was",
            remedy="restore it where job.json says it was",
        )
    prompts = pinned_prompts(folder, settings, events.say)
    trials = read_trials(folder.study_file)
    if number is None:
        trial = choose(trials, len(prompts.bad_search), settings.choice.refusal_tolerance)
    elif 0 <= number < len(trials):
        trial = trials[number]
    else:
        raise UsageError(f"job {record.job_id} has no trial {number}", remedy="`abliterate front` lists the best ones")
    if trial.values.reason is not None:
        raise UsageError(f"trial {number} failed: {trial.values.reason}", remedy="choose another")
    export = folder.export_folder(trial.number)
    with folder.held():
        if not is_sealed(export):
            from job.workbench import Workbench

            events.log_to(folder.events_file)
            with Workbench.prepared(folder, record, settings, prompts, events) as bench:
                bench.export(trial)
    return export
