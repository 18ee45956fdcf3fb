"""The search of a job: trials sampled, evaluated and stored in batches, and finalists scored again."""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path
from typing import Any

from job.config.schema import default_startup_trials
from job.lifecycle.running import OpenJob, RunningJob
from job.lifecycle.search_limits import SearchLimits, budget_of
from job.preflight.mounts import kind_of, mount_of, read_mounts
from job.records import Trial
from job.report.console import SearchLines
from job.report.results import trials_so_far
from job.scoring.objectives import Objectives
from job.search.optimizer import Search, StudySettings
from job.search.path import PathSpace
from job.stages.choice import finalist_batches
from job.stages.finalists import FinalistEvaluator
from job.stages.gradient import find_path
from job.stages.measuring import shown_generating
from job.stages.model import own_threads
from job.stages.objectives import require_something_to_remove, search_objectives
from job.stages.plans import PlanEvaluator
from job.stages.session import ModelSession, shared_directions
from job.storage.study_file import back_up
from job.workers.executor import Executor


def search(job: RunningJob, session: ModelSession, executor: Executor) -> list[Trial]:
    """Complete the study; return its trials, finalists with full-length counts.

    Raises ImpossibleJobError if the base model refuses nothing, HeldError after a takeover, or MachineError.
    """
    if not job.record.searches:
        return trials_so_far(job.folder)
    job.begin("search")
    find_path(job, session)
    target, asked = job.trials_wanted, len(session.prompts.bad_search)
    if job.record.startup_trials is None:
        job.file.pin(startup_trials=default_startup_trials(target))
    executor.share(shared_directions(session))
    with own_threads(job.settings):
        objectives = search_objectives(job, session)
        _measure_baseline(job, session, objectives)  # workers start up meanwhile
        evaluator = PlanEvaluator(job, session, executor, objectives)
        _tell_what_is_pinned(job)
        study = _study(job, session)
        done = len(study.finished())
        job.events.emit("search_started", f"search: {done} of {target} trials are done", done=done)
        budget = budget_of(job.folder, job.settings, job.meter)
        measuring = finalist_batches(job, session.prompts)
        limits = SearchLimits(budget, job.lock, job.signals, job.settings.grace, begun=done > 0, finalists=measuring)
        lines = SearchLines(study.finished(), target, asked, job.settings.choice.refusal_tolerance, job.words)
        with job.events.progress("trials", target, done, lines.note) as advance:

            def told(trial: Trial) -> None:
                _report_trial(job, trial, lines)
                advance(1)

            study.run(
                target,
                evaluator.scores,
                told=told,
                shielded=job.signals.shielded,
                batch=limits.batch,
                may_go_on=limits.may_go_on,
            )
        trials = study.finished()
        if len(trials) < target:
            job.events.emit("budget", f"the budget ends the search after {len(trials)} of {target} trials")
        return FinalistEvaluator(job, session, executor, evaluator).settled(trials)


def _measure_baseline(job: RunningJob, session: ModelSession, objectives: Objectives) -> None:
    with shown_generating(job.events, "base model's responses", session.scorer.metrics.most_tokens):
        figures, judged = session.scorer.baseline()
    others = {**objectives.of_base(judged.good, judged.bad), **session.scorer.measures.scores()}
    fields: dict[str, Any] = figures.model_dump()
    if others:
        fields["others"] = {name: score.model_dump() for name, score in others.items()}
    job.events.emit(
        "baseline",
        f"base model: {figures.refusals} of {figures.bad_prompts} bad prompts {job.words.shown}, "
        f"{figures.false_refusals} of {figures.good_prompts} good ones"
        + "".join(f"; {name} {score}" for name, score in others.items()),
        **fields,
    )
    require_something_to_remove(objectives, figures, others, job.words)


def _tell_what_is_pinned(job: OpenJob) -> None:
    """Warn if a later start asks for other batches than the first one resolved, under the same identity."""
    if job.record.reproduces is not None:
        return  # asked for by the file that the resolution is from
    batch, ahead = job.settings.trials_per_batch, job.settings.search.ahead
    for name, asked, pinned in (
        ("trials_per_batch", batch, job.record.trials_per_batch),
        ("search.ahead", ahead, job.record.batches_ahead),
    ):
        if asked not in (None, pinned):
            job.events.say(f"warning: {name} stays {pinned}, as at the first start, instead of {asked}")


def _study(job: OpenJob, session: ModelSession) -> Search:
    settings, resolution, startup = job.settings, job.resolution, job.record.startup_trials
    assert startup is not None
    live, copy = _study_place(job)
    return Search(
        live,
        session.space,
        StudySettings(
            seed=settings.seed,
            startup_trials=startup,
            batch=job.record.trials_per_batch,
            rows=resolution.search_rows or resolution.rows,
            ei_candidates=settings.search.ei_candidates,
            known_points=settings.search.known_points or isinstance(session.space, PathSpace),
            together=resolution.together,
            ahead=job.record.batches_ahead,
            racing=bool(resolution.racing),
            objectives=tuple(settings.search.objectives),
        ),
        copy,
    )


def _study_place(job: OpenJob) -> tuple[Path, Path | None]:
    """Return the path of the live study, and the path it is copied to after every batch.

    SQLite needs locks and in-place writes, unreliable on network file systems and object stores. There the study is on
    a local disk, and the workspace holds a consistent copy.
    """
    where, study = job.settings.study_storage, job.folder.study_file
    remote = kind_of(mount_of(job.folder.path, read_mounts())) in ("network", "object-store")
    if where == "workspace" or (where == "auto" and not remote):
        return study, None
    name = hashlib.sha256(str(job.folder.path.resolve()).encode()).hexdigest()[:16]
    live = Path(tempfile.gettempdir()) / f"abliterate-{name}" / study.name
    live.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    for left in live.parent.glob("study.db*"):
        left.unlink()  # of an earlier start, which may have been this far on another machine since
    if study.exists():
        back_up(study, live)
    return live, study


def _report_trial(job: OpenJob, trial: Trial, lines: SearchLines) -> None:
    best = lines.add(trial)
    message = lines.line(trial, best)
    job.events.emit("trial", message, minor=not best, number=trial.number, **trial.values.model_dump())
