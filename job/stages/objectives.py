"""The objectives of a job's search, with their scorers."""

from __future__ import annotations

from collections.abc import Mapping

from job.config.scorers import judging
from job.errors import ImpossibleJobError
from job.lifecycle.running import OpenJob
from job.model.files import list_model, parse_model
from job.records import DEFAULT_OBJECTIVES, REFUSALS, Figures, ObjectiveScore
from job.scoring.detectors import Context
from job.scoring.objectives import Objectives
from job.stages.session import ModelSession
from job.text.behaviour import BehaviourWords


def scorer_context(job: OpenJob) -> Context:
    """Return what a job's scorers are made from."""
    settings = job.settings
    return Context(
        settings.scoring,
        job.markers,
        settings.loading,
        job.events.say,
        settings.judge,
        settings.card.behaviour,
        job.folder.verdicts_file,
        job.resolution.scorers or {},
    )


def search_objectives(job: OpenJob, session: ModelSession) -> Objectives:
    """Return the search's objectives, with models on the Hub pinned to their commits. Raises JobError."""
    _pin_commits(job)
    prompts = session.prompts
    searched = (len(prompts.bad_search), len(prompts.good_search))
    return Objectives.made(job.settings.search.objectives, scorer_context(job), searched)


def _pin_commits(job: OpenJob) -> None:
    scoring, known = job.settings.scoring, dict(job.resolution.scorers or {})
    models = {"nli": scoring.nli_model, "classifier": scoring.classifier}
    for one in judging(job.settings.search.objectives):
        model = models.get(one.scorer)
        if model is None or one.scorer in known:
            continue
        commit = list_model(parse_model(model), None, job.events.say).commit
        if commit is not None:
            known[one.scorer] = commit
    if known != (job.resolution.scorers or {}):
        job.file.pin(resolution=job.resolution.model_copy(update={"scorers": known}))


def require_something_to_remove(
    objectives: Objectives, figures: Figures, others: Mapping[str, ObjectiveScore], words: BehaviourWords
) -> None:
    """Raise ImpossibleJobError if the base model does all that is wanted; `others` as from `Objectives.of_base`."""
    counts = {name: score.cost for name, score in others.items() if score.of is not None}
    if REFUSALS in objectives.names:
        counts[REFUSALS] = figures.refusals
    if any(counts.values()):
        return
    if objectives.names == DEFAULT_OBJECTIVES:
        raise ImpossibleJobError(
            f"the base model {words.shows} none of the bad evaluation prompts: there is nothing to remove",
            remedy="check the prompts and scoring.refusal_markers",
        )
    raise ImpossibleJobError(
        f"the base model's responses are as wanted by {', '.join(counts)}: there is nothing to remove",
        remedy="check the prompts and search.objectives",
    )
