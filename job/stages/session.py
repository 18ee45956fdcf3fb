"""A loaded model that can be edited: its directions, its hooks, and how edits are scored."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

from job.data.prompts import PromptSets
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
from job.search.path import PathSpace
from job.search.space import Space
from job.stages.measuring import EditScorer, metrics_of
from job.stages.model import loaded_model


@dataclass(frozen=True)
class ModelSession:
    """A job's model with its directions and hooks.

    Attributes:
        job: The job.
        prompts: All prompt sets.
        model: The base model.
        basis: The directions of all layers.
        scorer: Scores edits on the search split.
        hooks: The hooks on the base model, in place.
    """

    job: OpenJob
    prompts: PromptSets
    model: LoadedModel
    basis: Basis
    scorer: EditScorer
    hooks: Intervention

    @property
    def space(self) -> Space:
        """The space of edits."""
        return search_space(
            self.job.folder, self.job.settings.search.space, self.job.resolution.layers, self.basis.size
        )

    def edit(self, trial: Trial) -> EditParameters:
        """Return the edit of a trial.

        Raises:
            JobError: The run folder does not hold what it was made from.
        """
        return trial_edit(self.job.folder, self.job.settings.search.space, self.job.resolution.layers, trial)

    def basis_of(self, edit: EditParameters) -> Basis | DirectionPath:
        """Return the directions that an edit takes its own from.

        Raises:
            JobError: The run folder does not hold them.
        """
        return self.basis if edit.directions is None else read_learned(self.job.folder, edit.directions.sha256)


@dataclass(frozen=True)
class SharedDirections:
    """The directions that workers need for a job's trials.

    Attributes:
        basis: The directions of all layers, on the CPU.
        learned: Those that were learned by gradient, None if there are none.
    """

    basis: Basis
    learned: DirectionPath | None


def shared_directions(session: ModelSession) -> SharedDirections:
    """Return the directions that workers need for the trials of a session.

    Raises:
        JobError: The run folder does not hold the learned ones.
    """
    name = session.space.path.directions if isinstance(session.space, PathSpace) else None
    learned = None if name is None else read_learned(session.job.folder, name)
    return SharedDirections(session.basis.cpu(), learned)


def prompt_residuals(
    job: OpenJob, model: LoadedModel, prompts: PromptSets, evaluate: Evaluate | None = None
) -> PromptResiduals:
    """Return the residuals of a job's prompts, each set extracted when it is first needed.

    Args:
        job: The job.
        model: The model.
        prompts: All prompt sets.
        evaluate: Has forwards done by other processes as well; None: there are none.
    """
    rows, settings = job.resolution.rows, job.settings
    # The prompts whose length decides how many rows a forward takes.
    planned = [*prompts.good, *prompts.bad, *prompts.good_search, *prompts.bad_search]
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
    metrics = metrics_of(model, settings, prompts.good_search, prompts.bad_search, job.resolution.rows, job.events)
    learned = partial(read_learned, job.folder)
    with Intervention(model.model, model.architecture, basis, settings.ablation.row_normalization, learned) as hooks:
        yield ModelSession(job, prompts, model, basis, EditScorer(metrics, hooks, settings), hooks)


@contextmanager
def opened_session(job: OpenJob, prompts: PromptSets) -> Iterator[ModelSession]:
    """Yield a job's model with its directions and hooks, from the run folder's records.

    Raises:
        JobError: The model cannot be loaded here, or its files have changed.
    """
    with loaded_model(job, model_folder(job.record, job.settings, job.events), prompts) as model:
        basis = find_directions(prompt_residuals(job, model, prompts), job.settings.directions)
        with model_session(job, model, basis, prompts) as session:
            yield session
