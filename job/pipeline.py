"""The story of a run, top to bottom.

settings → preflight → prompts → model → residuals → directions → search → export → upload → report
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from job.data.prompts import PromptSets
from job.errors import ExportMismatchError, ImpossibleJobError, JobError
from job.export.reproduction import (
    Reproduction,
    environment_differences,
    require_same_prompts,
)
from job.lifecycle.model_folder import model_folder
from job.lifecycle.outcome import Outcome, missed_gate, outcome_of
from job.lifecycle.search_limits import SearchLimits, budget_of
from job.lifecycle.start import RunningJob
from job.model.files import parse_model
from job.preflight.checks import is_allowed
from job.preflight.cuda import read_cuda
from job.preflight.inputs import PreflightInputs
from job.preflight.mounts import kind_of, mount_of, read_mounts
from job.preflight.runner import preflight
from job.preflight.survey import Survey
from job.records import State, Trial
from job.report.markdown import write_reports
from job.report.run_view import RunResult, trials_so_far
from job.search.finalists import in_words, next_to_rescore, read_full_counts, with_full_counts
from job.search.optimizer import choose
from job.storage.atomic import read_record, write_record
from job.storage.exports import REPRODUCE, is_sealed, link_export
from job.storage.study_file import back_up, restore_if_damaged
from job.system.failpoints import reached
from job.upload.targets import deliver_to_all
from job.workers.crew import WarmWorkerPool

if TYPE_CHECKING:
    from job.lifecycle.session import Workbench


def run(running: RunningJob, inputs: PreflightInputs) -> Outcome:
    """Do all stages of a job."""
    return Job(running).do(inputs)


class Job:
    """One start of a job."""

    def __init__(self, running: RunningJob) -> None:
        self._hold = running.lock
        self._folder = running.folder
        self._record = running.record
        self._settings = running.settings
        self._events = running.events
        self._signals = running.signals
        self._meter = running.meter

    def do(self, inputs: PreflightInputs) -> Outcome:
        """Go through all stages; those that an earlier start has finished are passed over."""
        prompts = inputs.earlier.prompts
        damage = self._repair()
        trials = trials_so_far(self._folder)
        self._say_differences()
        if prompts is None or not self._is_searched_and_exported(trials, prompts):
            # A job of which only the delivery is left has its targets tell what is wrong with them.
            with WarmWorkerPool(self._others(trials), self._model_here()) as hands:
                prompts = self._preflight(inputs)
                if damage is not None:
                    # After preflight, which ends a loop of such starts.
                    self._phase("search")
                    raise damage
                trials = self._search_and_export(prompts, hands)
        chosen = self._choice(trials, prompts)
        export = self._export_folder(chosen)
        link_export(self._folder, export)
        self._require_same(export)
        outcome = outcome_of(self._folder, chosen.number, export)
        for warning in RunResult.read(self._folder).warnings:
            self._events.emit("doubt", f"warning: {warning}")
        missed = missed_gate(self._settings, outcome.edited)
        if missed is None:
            self._phase("upload")
            outcome = replace(outcome, failed_targets=tuple(self._deliver(export)))
        else:
            self._events.emit("gate_missed", f"nothing is delivered: {missed}")
            outcome = replace(outcome, missed_gate=missed)
        finished = self._finished(chosen, len(trials), missed)
        write_reports(self._folder, finished)
        write_record(self._folder.state_file, finished)
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
        return enough and not self._undecided(trials, prompts) and self._is_exported(self._choice(trials, prompts))

    def _undecided(self, trials: Sequence[Trial], prompts: PromptSets) -> bool:
        """Return whether trials that may be chosen have yet to be judged on answers of full length."""
        scoring, tolerance = self._settings.scoring, self._settings.choice.refusal_tolerance
        whole = scoring.effective_search_tokens == scoring.answer_tokens and scoring.gibberish is None
        if not self._record.searches or whole:
            return False
        return bool(next_to_rescore(trials, read_full_counts(self._folder), len(prompts.bad_search), tolerance, 1))

    def _others(self, trials: Sequence[Trial]) -> int:
        """Return how many processes will evaluate trials beside this one, on its device; with GPUs each has another."""
        searched = not self._record.searches or len(trials) >= self._settings.trials
        if searched or self._settings.workers is None:
            return 0
        on_gpus = self._settings.loading.device != "cpu" and bool(read_cuda().devices)
        return 0 if on_gpus else self._settings.workers - 1

    def _model_here(self) -> Path | None:
        """Return the model's folder if nothing has to be fetched."""
        source = parse_model(self._settings.model)
        return Path(source.name) if source.kind == "folder" else None

    def _search_and_export(self, prompts: PromptSets, hands: WarmWorkerPool) -> list[Trial]:
        """Do all that needs the model and return the trials."""
        # torch takes seconds to load and is needed for these stages only.
        from job.lifecycle.session import Workbench

        self._phase("model")
        model = model_folder(self._record, self._settings, self._events)
        with Workbench.prepared(self._folder, self._record, self._settings, model, prompts, self._events) as bench:
            trials = self._search(bench, hands) if self._record.searches else trials_so_far(self._folder)
            chosen = self._choice(trials, prompts)
            if not self._is_exported(chosen):
                self._phase("export")
                original = self._original()
                made = original.trials if original is not None else len(trials)
                bench.export(chosen, made, self._settings.export_format)
        return trials

    def _preflight(self, inputs: PreflightInputs) -> PromptSets:
        """Check all that can be checked before anything large is downloaded; return the prompts, pinned."""
        self._phase("preflight")
        found = preflight(inputs)
        survey, prompts = found.survey, found.prompts
        write_record(self._folder.preflight_file, survey)
        for check in survey.checks:
            if check.status != "ok":
                allowed = " (allowed)" if is_allowed(check, survey.allowed) else ""
                self._events.say(f"preflight: {check.status}{allowed}: {check.line}")
        self._events.emit("preflight", f"preflight: {survey.summary}", checks=[c.model_dump() for c in survey.checks])
        survey.require()
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
            pinned["planned_weights"] = {device.device: device.weights for device in survey.plan.devices}
        if pinned:
            self._record = self._record.model_copy(update=pinned)
            write_record(self._folder.job_file, self._record)

    def _choice(self, trials: Sequence[Trial], prompts: PromptSets) -> Trial:
        return choose(trials, len(prompts.bad_search), self._settings.choice.refusal_tolerance)

    def _is_exported(self, trial: Trial) -> bool:
        return is_sealed(self._export_folder(trial))

    def _search(self, bench: Workbench, hands: WarmWorkerPool) -> list[Trial]:
        """Bring the study to its target and return its trials."""
        self._phase("search")
        target, asked = self._settings.trials, len(bench.prompts.bad_search)
        with bench.crew(hands) as shared:
            bench.measure_baseline()  # meanwhile others get ready
            # Only the coordinator may open the study: what it finds, it carries over to where it is missing.
            search = bench.search(*self._study_place())
            done = len(search.finished())
            self._events.emit("search_started", f"search: {done} of {target} trials are done", done=done)
            budget = budget_of(self._folder, self._settings, self._meter)
            pace = SearchLimits(budget, self._hold, self._signals, self._settings.grace, begun=done > 0)
            with self._events.progress("trials", target, done) as advance:

                def told(trial: Trial) -> None:
                    self._tell(trial, asked)
                    advance(1)

                search.run(
                    target,
                    lambda plans: bench.evaluate(plans, shared),
                    told=told,
                    shielded=self._signals.shielded,
                    batch=pace.batch,
                    may_go_on=pace.may_go_on,
                )
            trials = search.finished()
            if len(trials) < target:
                self._events.emit("budget", f"the budget ends the search after {len(trials)} of {target} trials")
            if self._undecided(trials, bench.prompts):
                return bench.rescore(trials, shared)
        return with_full_counts(trials, read_full_counts(self._folder))

    def _tell(self, trial: Trial, asked: int) -> None:
        """Say what a trial came to, of so many prompts asked."""
        values = trial.values
        counted = f"{in_words(values, asked)}, KL {values.kl:.4g}"
        self._events.emit(
            "trial",
            f"trial {trial.number}: {f'failed: {values.reason}' if values.reason else counted}",
            number=trial.number,
            **values.model_dump(),
        )

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
        self._events.emit("phase", name=name)
        reached(f"stage:{name}")
        if self._folder.prompts_file.exists():  # before, there is nothing that another machine could go on from
            self._hold.keep()
