"""A loaded model ready for edits: directions, hooks and scorer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

from job.data.prompts import Prompt, PromptSets
from job.directions.extraction import find_directions
from job.directions.learned import read_learned
from job.directions.prompt_residuals import Evaluate, PromptResiduals, direction_prompts, tokens_of_forward
from job.edits.hooks import Intervention
from job.lifecycle.model_folder import model_folder
from job.lifecycle.running import OpenJob
from job.model.loading import LoadedModel
from job.numerics.basis import Basis, DirectionPath
from job.records import EditParameters, Trial
from job.report.results import search_space, trial_edit
from job.scoring.measures import EditMeasures
from job.scoring.report_metrics import ReportMetrics
from job.search.path import PathSpace
from job.search.space import Space
from job.stages.measuring import EditScorer, FinalistScorer, metrics_of
from job.stages.model import loaded_model


@dataclass(frozen=True)
class ModelSession:
    """A job's base model with its directions, scorers of the search and of finalists, and active hooks."""

    job: OpenJob
    prompts: PromptSets
    model: LoadedModel
    basis: Basis
    scorer: EditScorer
    finalists: FinalistScorer
    hooks: Intervention

    @property
    def space(self) -> Space:
        """The search space of edits."""
        return search_space(
            self.job.folder, self.job.settings.search.space, self.job.resolution.layers, self.basis.size
        )

    def edit(self, trial: Trial) -> EditParameters:
        """Return a trial's edit. Raises JobError if the run folder lacks its path."""
        return trial_edit(self.job.folder, self.job.settings.search.space, self.job.resolution.layers, trial)

    def basis_of(self, edit: EditParameters) -> Basis | DirectionPath:
        """Return the directions of an edit. Raises JobError if the run folder lacks them."""
        return self.basis if edit.directions is None else read_learned(self.job.folder, edit.directions.sha256)


@dataclass(frozen=True)
class SharedDirections:
    """Directions for a job's trials, on the CPU; `learned` is None without a gradient path."""

    basis: Basis
    learned: DirectionPath | None


def shared_directions(session: ModelSession) -> SharedDirections:
    """Return the directions that workers need. Raises JobError if the run folder lacks the learned ones."""
    name = session.space.path.directions if isinstance(session.space, PathSpace) else None
    learned = None if name is None else read_learned(session.job.folder, name)
    return SharedDirections(session.basis.cpu(), learned)


def prompt_residuals(
    job: OpenJob, model: LoadedModel, prompts: PromptSets, evaluate: Evaluate | None = None
) -> PromptResiduals:
    """Return the residuals of a job's prompts; `evaluate` shares forwards with other processes."""
    rows, settings = job.resolution.rows, job.settings
    # The prompts whose length determines the rows per forward.
    extraction = [*prompts.of_setting("good_prompts"), *prompts.of_setting("bad_prompts")]
    planned = [*extraction, *prompts.good_search, *prompts.bad_search]
    return PromptResiduals(
        job.folder,
        job.record,
        model,
        {name: model.tokenize(found) for name, found in direction_prompts(prompts).items()},
        rows,
        tokens_of_forward(model, planned, rows, settings.scoring.answer_tokens),
        settings.directions.winsorization_quantile,
        job.events,
        evaluate,
    )


@contextmanager
def model_session(job: OpenJob, model: LoadedModel, basis: Basis, prompts: PromptSets) -> Iterator[ModelSession]:
    """Yield a loaded model with its hooks in place."""
    settings = job.settings
    rows, events = job.resolution.rows, job.events

    def measure(good: Sequence[Prompt], bad: Sequence[Prompt]) -> ReportMetrics:
        return metrics_of(model, settings, job.markers, good, bad, rows, events)

    learned = partial(read_learned, job.folder)
    with Intervention(model.model, model.architecture, basis, settings.ablation.row_normalization, learned) as hooks:
        measures = partial(EditMeasures.of, model, settings, prompts.text, rows, events.say)
        scorer = EditScorer(measure(prompts.good_search, prompts.bad_search), hooks, settings, measures)
        finalists = FinalistScorer(scorer, hooks, settings, prompts, measure)
        yield ModelSession(job, prompts, model, basis, scorer, finalists, hooks)


@contextmanager
def opened_session(job: OpenJob, prompts: PromptSets) -> Iterator[ModelSession]:
    """Yield a job's model with directions and hooks, from the run folder's records. Raises JobError."""
    with loaded_model(job, model_folder(job.record, job.settings, job.events), prompts) as model:
        basis = find_directions(prompt_residuals(job, model, prompts), job.settings.directions)
        with model_session(job, model, basis, prompts) as session:
            yield session
