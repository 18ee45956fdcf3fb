"""The gradient path of edits, computed once, before the search explores around it."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import asdict, replace

import torch

from job.data.prompts import held_out
from job.directions.learned import keep_learned, learned_file
from job.directions.residuals import digest
from job.edits.hooks import ActiveEdits
from job.errors import MemoryShortageError
from job.gradient.descent import NO_GRADIENT, Descent, DescentState, StageEnd, gradient_fault, path_of
from job.gradient.hooks import DifferentiableEdits
from job.gradient.problem import LossWeights, Problem
from job.gradient.recipe import Recipe
from job.lifecycle.running import RunningJob
from job.lifecycle.search_limits import budget_of
from job.model.config_file import model_config
from job.model.device_faults import halving
from job.numerics.gradient import EditVariables
from job.preflight.checks import size
from job.preflight.gradient_memory import DescentRow, probe_bytes
from job.preflight.model_facts import model_facts
from job.records import COMPONENTS, DEFAULT_OBJECTIVES, EditParameters, LearnedDirections, TrialScores
from job.records.edit_path import EditPath, PathStage
from job.report.results import trials_so_far
from job.scoring.prompt_batches import PromptBatches
from job.scoring.trial_scorer import TrialScorer
from job.search.method import planned_method
from job.search.path import SCALES
from job.stages.model import worker_count
from job.stages.session import ModelSession
from job.storage.atomic import ensure_folder, write_record
from job.tuning.memory_probe import Gauge

# One in this many prompts of the directions is held out, for early stopping: the choice's prompts stay unseen.
_HELD_OUT = 4
# Fewest refused prompts to start with.
_LEAST_REFUSALS = 8
# Share of held-out prompts that a path's best stage may leave refused or broken, if trials over kernels may do better.
_MOST_LEFT = 1 / 10


def find_path(job: RunningJob, session: ModelSession) -> None:
    """Compute the path of edits around which trials are sampled, if wanted. Raises MachineError.

    A study begun without a path continues without. Without usable gradients the search uses weight kernels, which is
    reported and recorded; with `search.method` "auto" also where the path leaves many refusals.
    """
    folder = job.folder
    method = planned_method(job.record, job.settings.search.asked_method)
    if method != "gradient" or folder.path_file.exists() or trials_so_far(folder):
        return
    _tell_what_is_not_descended(job)
    path = _Finder(job, session, Recipe()).found()
    ensure_folder(folder.path_file.parent)
    write_record(folder.path_file, path)
    if path.failed is not None:
        job.events.emit("gradient_failed", f"warning: no edits by gradient: {path.failed}; searching with tpe")
    else:
        job.events.emit("gradient_path", f"edits by gradient: {len(path.stages)} stages", stages=len(path.stages))
    shutil.rmtree(folder.gradient_folder, ignore_errors=True)  # the descent's state, no longer needed


def _tell_what_is_not_descended(job: RunningJob) -> None:
    """Say which objectives the descent cannot lower; trials around its path are still scored by all."""
    names = job.settings.search.objectives
    others = [name for name in names if name not in DEFAULT_OBJECTIVES]
    if others:
        job.events.say(
            f"warning: gradients lower refusals and KL only; {', '.join(others)} cannot be differentiated, and only "
            "trials around the path are compared by it"
        )


class _Finder:
    def __init__(self, job: RunningJob, session: ModelSession, recipe: Recipe) -> None:
        self._job, self._session, self._recipe = job, session, recipe
        self._good, self._bad = (
            held_out(prompts, max(1, len(prompts) // _HELD_OUT), job.settings.seed, f"{kind} early stopping")
            for kind, prompts in (("good", session.prompts.good), ("bad", session.prompts.bad))
        )
        self._scorer: TrialScorer | None = None
        self._written: str | None = None

    @property
    def _key(self) -> str:
        record, session = self._job.record, self._session
        return digest(
            {
                "identity": record.identity,
                "commit": record.model_commit,
                "versions": record.versions,
                "resolution": self._job.resolution.model_dump(mode="json"),
                "directions": session.basis.directions.flatten().tolist(),
                "recipe": asdict(self._recipe),
                "held out": [prompt.user for prompt in (*self._good[1], *self._bad[1])],
            }
        )

    def found(self) -> EditPath:
        """Return the path, or the reason that there is none."""
        try:
            return self._found()
        except MemoryShortageError as error:
            if self._job.settings.search.method != "auto":
                raise
            return self._path((), str(error))

    def _found(self) -> EditPath:
        fault = self._offloaded()
        if fault is not None:
            return self._path((), fault)
        job, session, recipe = self._job, self._session, self._recipe
        settings = job.settings
        edits = DifferentiableEdits(session.model, settings.ablation.row_normalization, recipe.largest)
        problem = Problem.measured(
            session.model,
            edits,
            recipe,
            settings.seed,
            (self._good[0], self._bad[0]),
            job.markers,
            settings.scoring.effective_search_tokens,
            job.resolution.rows,
            settings.scoring.gibberish,
        )
        if len(problem.bad) < _LEAST_REFUSALS:
            return self._path((), f"the base model {job.words.shows} {len(problem.bad)} of {len(self._bad[0])} prompts")
        start = self._fitting(problem, DescentState.start(session.basis, recipe))
        fault = gradient_fault(problem, start, LossWeights(recipe.first_beta, recipe.sparsity), job.events.say)
        if fault is not None:
            return self._path((), f"gradients of this model cannot be used: {fault}")
        room = budget_of(job.folder, settings, job.meter).has_room_for
        held_out, file = len(self._bad[1]), job.folder.gradient_folder / "state.safetensors"
        descent = Descent(problem, self._measured, self._activated, held_out, file, self._key, job.events.say, room)
        with job.events.progress("gradient steps", recipe.steps * recipe.stages) as advance:
            ends = descent.run(start, advance)
        least = min(end.scores.unanswered if end.scores.reason is None else held_out for end in ends)
        if settings.search.method == "auto" and not descent.cut_short and least > _MOST_LEFT * held_out:
            return self._path((), f"they leave {least} of {held_out} held-out prompts {job.words.shown} or broken")
        return self._path(ends, None)

    def _fitting(self, problem: Problem, start: DescentState) -> DescentState:
        """Return the start with rows per forward that fit: out of memory on a CPU would end the process."""
        job, model = self._job, self._session.model
        gauge = Gauge(model.model, worker_count(job.settings, model.device))
        self._require_room(problem, gauge)
        gauge.begin()
        try:
            halving(1, lambda _: problem.read_longest(start.variables), job.events.say)
        except NO_GRADIENT:
            return start  # `gradient_fault` says why
        growth, rows = gauge.growth(), start.rows
        while rows > 1 and not gauge.fits([rows * taken for taken in growth]):
            rows //= 2
        if rows < start.rows:
            job.events.say(f"gradient steps: {rows} rows a forward pass, as memory allows")
        return replace(start, rows=rows)

    def _require_room(self, problem: Problem, gauge: Gauge) -> None:
        """Raise MemoryShortageError if a prompt's gradients cannot fit into RAM.

        There the probe itself would be killed, again at every start; GPUs raise an error instead.
        """
        loaded = self._session.model
        if loaded.device.type != "cpu":
            return
        # Only sizes count: how the files are quantised does not.
        config = {name: value for name, value in model_config(loaded.folder).items() if name != "quantization_config"}
        shapes = {name: ("F32", tuple(parameter.shape)) for name, parameter in loaded.model.named_parameters()}
        row = DescentRow(
            tokens=problem.longest,
            answer_tokens=self._recipe.kl_tokens,
            dtype_bytes=getattr(torch, loaded.dtype).itemsize,
            mode=self._job.settings.ablation.row_normalization,
        )
        taken = probe_bytes(model_facts(config, shapes), row)
        if not gauge.fits([taken]):
            raise MemoryShortageError(
                f"out of memory: gradients of one prompt take {size(taken)}, more than the {size(gauge.room[0])} "
                "that may be used",
                remedy='choose a machine with more memory, or --set search.method="tpe"',
            )

    def _offloaded(self) -> str | None:
        offloaded = any(parameter.is_meta for parameter in self._session.model.model.parameters())
        return "weights are offloaded" if offloaded else None

    def _path(self, ends: Sequence[StageEnd], fault: str | None) -> EditPath:
        recipe = self._recipe
        learned = keep_learned(self._job.folder, path_of(ends)) if ends else None
        self._forget(learned)
        return EditPath(
            key=self._key,
            largest=recipe.largest,
            scales=SCALES,
            prompts=len(self._bad[1]),
            stages=tuple(
                PathStage(
                    beta=end.beta,
                    steps=end.steps,
                    logits=dict(zip(COMPONENTS, end.variables.logits[0].tolist(), strict=True)),
                    refusals=end.scores.refusals,
                    broken=end.scores.broken,
                    kl=end.scores.kl,
                )
                for end in ends
            ),
            directions=learned,
            failed=fault,
        )

    def _measured(self, variables: EditVariables) -> TrialScores:
        """Score an edit on the held-out prompts, as the search would."""
        job, session = self._job, self._session
        settings, rows = job.settings, job.resolution.rows
        if self._scorer is None:
            batches = PromptBatches.of(session.model, self._good[1], self._bad[1], rows, report=job.events.say)
            limits = (settings.scoring.answer_tokens, settings.kl_tokens)
            self._scorer = TrialScorer.measured(batches, job.markers, *limits)
        limit = settings.scoring.effective_search_tokens
        scorer, edit = self._scorer, self._edit(variables)
        return scorer.batches.row_limit.fit(
            lambda rows: scorer.scores(session.hooks, [edit], rows, response_tokens=limit)[0]
        )

    def _activated(self, variables: EditVariables) -> ActiveEdits:
        return self._session.hooks.activate([self._edit(variables)])

    def _edit(self, variables: EditVariables) -> EditParameters:
        """Return a trial's edit; its directions stay in the run folder until the next call."""
        end = StageEnd(variables, 0.0, 0, TrialScores(refusals=0, kl=0.0))
        self._forget(None)
        self._written = keep_learned(self._job.folder, path_of([end]))
        strengths = variables.strengths(self._recipe.largest)[0].tolist()
        return EditParameters(
            direction_index=None,
            kernels={},
            layer_strengths=dict(zip(COMPONENTS, strengths, strict=True)),
            directions=LearnedDirections(sha256=self._written, position=0.0),
        )

    def _forget(self, kept: str | None) -> None:
        if self._written is not None and self._written != kept:
            learned_file(self._job.folder, self._written).unlink(missing_ok=True)
        self._written = None
