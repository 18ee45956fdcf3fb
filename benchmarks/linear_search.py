"""Searches for linear edits on a small model, in one process: what `benchmarks.methods` compares."""

from __future__ import annotations

import random
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, cast

import torch
from optuna.distributions import BaseDistribution, CategoricalDistribution
from torch import Tensor, nn

from benchmarks.linear_edits import Choices, Measures, ObliqueHooks, auc, writer_outputs
from job.config.load import default_values
from job.config.sections import LoadingSettings
from job.data.prompts import Prompt
from job.directions.residuals import extract_residuals, layer_outputs
from job.model.loading import LoadedModel, load_model
from job.model.placement import read_parameter
from job.numerics.ablation import (
    RowNormalization,
)
from job.numerics.basis import Basis, orthogonalize
from job.numerics.directions import mean_difference
from job.organism.world import TASKS
from job.records import EditParameters, Plan, Trial, TrialScores
from job.scoring.kl import KLReference
from job.scoring.prompt_batches import PromptBatches
from job.scoring.trial_scorer import TrialScorer
from job.search.optimizer import Search, StudySettings
from job.search.pareto import pareto_front
from job.search.space import SearchSpace
from job.text.refusal_markers import RefusalMarkers

ROWS, BATCH, RESPONSE_TOKENS, KL_POSITIONS = 256, 4, 30, 8
# Share of bad prompts that may stay unanswered, and of those that a trial on the front may leave to be measured.
MOST_UNANSWERED, MOST_MEASURED = 0.02, 0.06


@dataclass
class Bench:
    """A model with its directions, ready for cells; `sets` are its folder's prompt files."""

    loaded: LoadedModel
    sets: dict[str, list[Prompt]]
    residuals: dict[str, Tensor]
    measures: Measures
    _hooks: dict[tuple[str, ...], ObliqueHooks] = field(default_factory=dict)

    @classmethod
    def of(cls, folder: Path) -> Bench:
        """Load a folder's model and measure its stream and writers."""
        loaded = load_model(folder / "model", LoadingSettings.model_validate(default_values()["loading"]), print)
        loaded = replace(loaded, architecture=loaded.architecture.pulled_back("dual"))
        names = ("good_train", "good_test", "bad_train", "bad_test")
        sets = {one: [Prompt(user=text) for text in (folder / f"{one}.txt").read_text().splitlines()] for one in names}
        bench = cls(loaded, sets, {}, Measures())
        bench._read_last()
        bench._read_text()
        return bench

    def _read_last(self) -> None:
        """Read the last positions of all prompts; half of them give the AUC, by directions of the others."""
        outputs = {}
        for kind in ("good", "bad"):
            with writer_outputs(self.loaded) as kept:
                # One by one, since several would be read by length.
                tokens = self.loaded.tokenize(self.sets[f"{kind}_train"])
                found = [extract_residuals(self.loaded, [prompt], 1, lambda _: None) for prompt in tokens]
            self.residuals[kind] = torch.cat(found)[:, 1:].double()
            outputs[kind] = {name: torch.stack([rows[-1] for rows in all_rows]) for name, all_rows in kept.items()}
        good, bad = (self.residuals[kind] for kind in ("good", "bad"))
        self.measures.stream["last"] = torch.einsum("nld,nle->lde", good, good) / len(good)
        centred = {name: rows - rows.mean(0) for name, rows in outputs["good"].items()}
        for positions, by_writer in (("last", outputs["good"]), ("centred", centred)):
            self.measures.outputs[positions] = {name: rows.mT @ rows for name, rows in by_writer.items()}
        directions = mean_difference(good[::2], bad[::2]).double()
        read = partial(read_parameter, self.loaded.model)
        for writer in self.loaded.architecture.writers:
            if writer.parameter in outputs["good"]:
                place, own = (writer.component, writer.layer), directions[writer.layer]
                pulled, _ = writer.pull_back(own[None], read)
                along = [outputs[kind][writer.parameter][1::2] @ pulled[0] for kind in ("good", "bad")]
                self.measures.auc["outputs"][place] = auc(*along)
                self.measures.auc["stream"][place] = auc(*(one[1::2, writer.layer] @ own for one in (good, bad)))

    @torch.inference_mode()
    def _read_text(self) -> None:
        """Read all positions of good prompts and the base model's responses."""
        good = self.sets["good_train"]
        batches = PromptBatches.of(self.loaded, good, good[:1], ROWS)
        answers = batches.responses(batches.good.tokens, RESPONSE_TOKENS, ROWS)
        layers = cast(nn.ModuleList, self.loaded.model.get_submodule(self.loaded.architecture.layers))
        moments = torch.zeros_like(self.measures.stream["last"])

        def keep(index: int, hidden: Tensor) -> None:
            if index:
                moments[index - 1] += hidden[0].double().mT @ hidden[0].double()

        with writer_outputs(self.loaded) as kept, layer_outputs(layers, keep):
            for prompt, answer in zip(batches.good.tokens, answers, strict=True):
                self.loaded.model(input_ids=torch.tensor([[*prompt, *answer.tokens]]), use_cache=False)
        self.measures.stream["text"] = moments
        every = {name: torch.cat(rows) for name, rows in kept.items()}
        self.measures.outputs["text"] = {name: rows.mT @ rows for name, rows in every.items()}

    def basis(self, keeps: str) -> Basis:
        """Return the mean differences, cleaned."""
        good, bad = self.residuals["good"], self.residuals["bad"]
        directions = mean_difference(good, bad)[:, None]
        kind, _, share = keeps.partition(":")
        if kind == "tasks":
            starts = [task.question.split("{")[0] for task in TASKS]
            texts = [prompt.user for prompt in self.sets["good_train"]]
            means = [good[[text.startswith(start) for text in texts]].mean(0) for start in starts]
            directions, _ = orthogonalize(directions, (torch.stack(means[1:]) - means[0]).transpose(0, 1))
        elif kind == "share":
            layers = []
            for layer in range(good.shape[1]):
                _, values, vectors = torch.linalg.svd(good[:, layer] - good[:, layer].mean(0), full_matrices=False)
                held = values.square().cumsum(0) / values.square().sum()
                layers.append(torch.where((held <= float(share))[:, None], vectors, 0.0))
            directions, _ = orthogonalize(directions, torch.stack(layers))
        return Basis.single(directions[:, 0])

    def hooks(self, choice: Mapping[str, str], stack: ExitStack) -> ObliqueHooks:
        """Return a choice's hooks, in place until the stack ends."""
        key = tuple(choice.values())
        if key not in self._hooks:
            mode = cast(RowNormalization, choice["norms"])
            self._hooks[key] = stack.enter_context(
                ObliqueHooks(self.loaded, self.basis(choice["keeps"]), mode, self.measures, choice)
            )
            stack.callback(self._hooks.pop, key)
        return self._hooks[key]


@dataclass(frozen=True)
class MethodSpace:
    """The product's space with a method's own parameters."""

    kernels: SearchSpace
    choices: Choices

    def distributions(self) -> dict[str, BaseDistribution]:
        """Return the range of every parameter."""
        return self.kernels.distributions() | self.choices.searched

    def known_points(self) -> list[dict[str, Any]]:
        """Return the product's first points, with each of the first values of the method's choices in turn."""
        ways = [
            dict(zip(self.choices.searched, values, strict=True))
            for values in product(
                *(
                    one.choices if isinstance(one, CategoricalDistribution) else (0.5,)
                    for one in self.choices.searched.values()
                )
            )
        ]
        points = self.kernels.known_points()
        return [{**point, **ways[number % len(ways)]} for number, point in enumerate(points)]

    def edit(self, params: dict[str, Any]) -> EditParameters:
        """Return a trial's edit but for the method's own choices."""
        own = self.choices.searched
        return self.kernels.edit({name: value for name, value in params.items() if name not in own})


@dataclass(frozen=True)
class MethodScorer:
    """Scores trials of a method, whose hooks are in place until the stack ends."""

    bench: Bench
    choices: Choices
    space: MethodSpace
    stack: ExitStack

    def hooks(self, params: Mapping[str, Any]) -> ObliqueHooks:
        """Return the hooks of a trial's choices."""
        return self.bench.hooks(self.choices.of(params), self.stack)

    def edits(self, hooks: ObliqueHooks, params: Sequence[dict[str, Any]]) -> list[EditParameters]:
        """Return the edits of trials of one choice, with their thresholds set."""
        edits = [self.space.edit(one) for one in params]
        hooks.thresholds = {
            id(edit): one["threshold"] for edit, one in zip(edits, params, strict=True) if "threshold" in one
        }
        return edits

    def scores(self, scorer: TrialScorer, params: Sequence[dict[str, Any]]) -> list[TrialScores]:
        """Score trials; those of one choice share forwards."""
        found: dict[int, TrialScores] = {}
        groups: dict[int, list[int]] = defaultdict(list)
        for number, one in enumerate(params):
            groups[id(self.hooks(one))].append(number)
        for numbers in groups.values():
            hooks = self.hooks(params[numbers[0]])
            edits = self.edits(hooks, [params[number] for number in numbers])
            found |= zip(numbers, scorer.scores(hooks, edits, ROWS), strict=True)
        return [found[number] for number in range(len(params))]

    def gentlest(self, front: Sequence[Trial], held_out: TrialScorer) -> dict[str, float]:
        """Return the figures of the trial of least KL on held-out prompts that leaves few unanswered; {} if none."""
        scores = self.scores(held_out, [one.params for one in front])
        enough = [
            (trial, one)
            for trial, one in zip(front, scores, strict=True)
            if one.reason is None and one.unanswered <= MOST_UNANSWERED * len(held_out.batches.bad)
        ]
        if not enough:
            return {}
        trial, one = min(enough, key=lambda found: found[1].kl)
        hooks = self.hooks(trial.params)
        rows = held_out.batches.trial_rows(hooks.activate(self.edits(hooks, [trial.params])))
        (over_positions,) = KLReference.measured(held_out.batches, KL_POSITIONS).trial_means(
            held_out.batches, rows, ROWS
        )
        return {"refusals": one.refusals, "broken": one.broken, "kl": one.kl, "kl_positions": over_positions}


def measured(bench: Bench, choices: Choices, trials: int, seed: int) -> dict[str, float]:
    """Search with TPE on half of the test prompts; return the gentlest edit's figures on the other half."""
    space = MethodSpace(SearchSpace("wide", bench.loaded.architecture.layer_count), choices)
    tests = [bench.sets[f"{kind}_test"] for kind in ("good", "bad")]
    mixed = [random.Random(seed).sample(prompts, len(prompts)) for prompts in tests]
    half = len(mixed[1]) // 2
    markers = RefusalMarkers(default_values()["scoring"]["refusal_markers"])
    scorer, held_out = (
        TrialScorer.measured(PromptBatches.of(bench.loaded, good, bad, ROWS), markers, RESPONSE_TOKENS)
        for good, bad in ([one[: len(one) // 2] for one in mixed], [one[len(one) // 2 :] for one in mixed])
    )
    with ExitStack() as stack, tempfile.TemporaryDirectory() as folder:
        method = MethodScorer(bench, choices, space, stack)

        def evaluate(plans: Sequence[Plan]) -> list[TrialScores]:
            return method.scores(scorer, plans[0].parameters)

        settings = StudySettings(seed, max(BATCH, trials // 3), BATCH, ROWS, 128)
        study = Search(Path(folder) / "study.db", space, settings)
        study.run(trials, evaluate, told=lambda _: None)
        front = [one for one in pareto_front(study.finished()) if one.values.unanswered <= MOST_MEASURED * half]
        return method.gentlest(front, held_out)
