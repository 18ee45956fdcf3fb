"""Linear edits beyond the product's, as hooks: co-vectors, cleaned directions, masked layers and norm modes searched.

Each is prototyped on the pieces of a job, in one process: residuals, hooks, scorer and search. A method is a set of
choices; a choice with several values is a parameter of the search. What wins is worth building into the product; see
docs/lab-notes/directions.md.

An oblique edit is y' = y - λ a (b·y), b·a = 1. Of all reads b, a co-vector changes the model's outputs to good prompts
least: b ~ (S + ρI)⁻¹a with S their second moments. This is what ridge regression leaves of a.
"""

from __future__ import annotations

import random
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any, cast

import torch
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from torch import Tensor, nn

from job.architectures.spec import Writer
from job.config.load import default_values
from job.config.sections import LoadingSettings
from job.data.prompts import Prompt
from job.directions.residuals import extract_residuals
from job.edits.compile import EditBatch, WriterGroup, _orthonormal_before_norms, strengths
from job.edits.hooks import HookTables, Intervention
from job.model.loading import LoadedModel, load_model
from job.model.placement import read_parameter
from job.numerics.ablation import (
    RowNormalization,
    WriterEdit,
    _column_scale,
    _row_scale,
    project,
    stack_products,
    weight_products,
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


@dataclass(frozen=True)
class Choices:
    """A method; several values of a choice are searched.

    Attributes:
        norms: Norms of weights that are kept.
        reads: What is read: "same" as written; "stream:ρ" or "outputs:ρ", the co-vector by the stream's or the writer's
            own outputs to good prompts, ρ relative to their mean square; "centred:ρ" by these less their mean; "soft:ρ",
            the stream's, written too.
        keeps: What directions are cleaned of: "nothing"; "share:s", the good prompts' first principal components with
            that share of the variance; "tasks", the differences between an organism's tasks.
        masks: What decides where an edit acts, by a searched threshold of the AUC by which projections on held-out
            prompts tell the classes apart: "none", "stream" or "outputs".
    """

    norms: tuple[RowNormalization, ...] = ("none",)
    reads: tuple[str, ...] = ("same",)
    keeps: tuple[str, ...] = ("nothing",)
    masks: tuple[str, ...] = ("none",)

    @property
    def searched(self) -> dict[str, BaseDistribution]:
        """The method's own parameters of the search."""
        found: dict[str, BaseDistribution] = {
            name: CategoricalDistribution(values) for name, values in vars(self).items() if len(values) > 1
        }
        if self.masks != ("none",):
            found["threshold"] = FloatDistribution(0.5, 1.0)
        return found

    def of(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """Return a trial's choices."""
        return {name: params.get(name, values[0]) for name, values in vars(self).items()}


LINEAR = {
    "default": Choices(),
    "norms pre": Choices(norms=("pre",)),
    "norms full": Choices(norms=("full",)),
    "norms column": Choices(norms=("column",)),
    "co-vector of the stream, 0.1": Choices(reads=("stream:0.1",)),
    "co-vector of the stream, 1": Choices(reads=("stream:1",)),
    "co-vector of outputs, 0.01": Choices(reads=("outputs:0.01",)),
    "co-vector of outputs, 0.1": Choices(reads=("outputs:0.1",)),
    "co-vector of outputs, 1": Choices(reads=("outputs:1",)),
    "co-vector of outputs about their mean, 0.1": Choices(reads=("centred:0.1",)),
    "direction cleaned by ridge, 1": Choices(reads=("soft:1",)),
    "cleaned of 50 %": Choices(keeps=("share:0.5",)),
    "cleaned of 90 %": Choices(keeps=("share:0.9",)),
    "cleaned of tasks": Choices(keeps=("tasks",)),
    "mask by the stream": Choices(masks=("stream",)),
    "mask by outputs": Choices(masks=("outputs",)),
    "searched": Choices(
        norms=("none", "full"), reads=("same", "outputs:0.1"), keeps=("nothing", "share:0.5"), masks=("none", "outputs")
    ),
}


class ObliqueHooks(Intervention):
    """Hooks of edits that read other directions than they write.

    `reads` gives, for a writer and its writes before its norms [m, d], the reads; `masks` the least threshold at which
    a writer is not edited any more; `thresholds` those of the edits, by identity.
    """

    def __init__(
        self, loaded: LoadedModel, basis: Basis, mode: RowNormalization, found: GoodOutputs, choice: Mapping[str, str]
    ) -> None:
        """Compute every writer's reads and writes, and their products with its weight."""
        super().__init__(loaded.model, loaded.architecture, basis, mode)
        self.thresholds: dict[int, float] = {}
        self._auc = found.auc.get(choice["masks"], {})
        self._oblique: list[tuple[WriterGroup, Tensor]] = []
        for group in self._groups:
            shape = (len(group.writers), 1, *group.candidates.shape[-2:])
            written = group.candidates.expand(shape)
            if group.products.metric is not None:
                written = written * group.products.metric[..., None, :]
            reads, products = [], []
            for writer, candidates, writes in zip(group.writers, group.candidates.expand(shape), written, strict=True):
                read, write = found.reads(choice["reads"], writer, candidates[0], writes[0], mode)
                weight = None if mode == "none" else writer.matrix(read_parameter(loaded.model, writer.parameter))
                one = weight_products(read if weight is None else weight, read, mode)
                if mode == "column" and weight is not None:
                    one = replace(one, column_writes=write @ weight.to(write))
                reads.append(torch.cat([read, write]))
                products.append(one)
            both = torch.stack(reads)[:, None]
            count = shape[2]
            changed = replace(group, candidates=both[..., :count, :], products=stack_products(products))
            self._oblique.append((changed, both[..., count:, :]))

    def _apply(self, number: int, batches: Sequence[EditBatch]) -> tuple[Tensor, Tensor]:
        compiled = [self._compiled(number, batch) for batch in batches]
        writers = self._groups[number].writers
        for writer, tables in zip(writers, HookTables.of(compiled, len(writers)), strict=True):
            self._sites[writer.parameter].tables = tables
        finite = torch.cat([edit.finite.all(0) for edit in compiled])
        return finite, torch.cat([edit.least_share for edit in compiled], 1)

    def _compiled(self, number: int, batch: EditBatch) -> WriterEdit:
        group, written = self._oblique[number]
        if batch.coefficients is None:
            own = [self._basis.select(None, writer.layer)[0] for writer in group.writers]
            coefficients = torch.stack(own)[:, None].expand(-1, len(batch.parameters), -1, -1)
        else:
            coefficients = batch.coefficients.expand(len(group.writers), -1, -1, -1)
        coefficients = _orthonormal_before_norms(coefficients, self._groups[number].gram, 1).to(written)
        read = project(group.products, group.candidates, coefficients)
        writes = coefficients @ written
        unit = 1 / (read.directions * writes).sum(-1, keepdim=True)  # the write is removed at λ = 1

        def scaled(table: Tensor | None) -> Tensor | None:
            return None if table is None else table * unit

        read = replace(
            read,
            directions=read.directions * unit,
            row_products=scaled(read.row_products),
            column_products=scaled(read.column_products),
        )
        ones = torch.ones(len(batch.parameters), 1, dtype=torch.float64)
        given = strengths(group.writers, batch.parameters, ones) * self._acts(group.writers, batch.parameters)
        write = given[..., None] * writes
        share, scale, inputs = torch.ones(write.shape[:2], dtype=torch.float64), None, None
        if self._mode == "full":
            scale, share = _row_scale(group.products, read, write)
        elif self._mode == "column":
            inputs, share = _column_scale(group.products, read, given, write)
        norms, inverses = group.products.row_norms, group.products.row_inverses
        finite = torch.ones(share.shape, dtype=torch.bool)
        return WriterEdit(read.directions, write, norms, inverses, scale, inputs, share, finite)

    def _acts(self, writers: Sequence[Writer], edits: Sequence[EditParameters]) -> Tensor:
        """Return where edits act, [S, K, 1]."""
        rows = [
            [self._auc.get((one.component, one.layer), 1.0) >= self.thresholds.get(id(edit), 0.0) for edit in edits]
            for one in writers
        ]
        return torch.tensor(rows, dtype=torch.float64)[..., None]


@dataclass
class GoodOutputs:
    """What a model's stream and writers hold at good prompts.

    Attributes:
        stream: Second moments of the stream after each layer, [layers, d, d], float64.
        writers: Outputs of each writer at good prompts' last positions, [n, d], by parameter.
        norms: Row norms of each writer's weight, [d]; experts have none.
        auc: How well projections tell held-out prompts apart, by mask, component and layer.
    """

    stream: Tensor
    writers: dict[str, Tensor] = field(default_factory=dict)
    norms: dict[str, Tensor] = field(default_factory=dict)
    auc: dict[str, dict[tuple[str, int], float]] = field(default_factory=lambda: defaultdict(dict))

    def reads(
        self, what: str, writer: Writer, candidates: Tensor, writes: Tensor, mode: RowNormalization
    ) -> tuple[Tensor, Tensor]:
        """Return reads and writes, both [m, d], before a writer's norms."""
        kind, _, ridge = what.partition(":")
        if kind == "same":
            return candidates, writes
        if kind in ("outputs", "centred"):
            outputs = self.writers[writer.parameter]
            if kind == "centred":
                outputs = outputs - outputs.mean(0)
            if mode in ("pre", "full"):
                outputs = outputs / self.norms[writer.parameter]
            return _covector(outputs.mT @ outputs / len(outputs), writes, float(ridge)), writes
        # The candidates are directions of layers: each has its own layer's second moments.
        scale = candidates.norm(dim=-1, keepdim=True)
        found = [_covector(moments, one[None], float(ridge)) for moments, one in zip(self.stream, candidates)]
        read = torch.cat(found) * scale
        return read, (read if kind == "soft" else writes)


def _covector(moments: Tensor, writes: Tensor, ridge: float) -> Tensor:
    """Return (S + ρI)⁻¹a for writes a [m, d], scaled to b·a = 1."""
    mean = moments.diagonal().mean()
    solved = torch.linalg.solve(moments / mean + ridge * torch.eye(len(moments)).to(moments), writes.mT).mT
    return solved / (solved * writes).sum(-1, keepdim=True)


def auc(good: Tensor, bad: Tensor) -> float:
    """Return the probability that a bad prompt's projection exceeds a good one's, or the reverse if that is higher."""
    above = (bad[:, None] > good).double().mean() + 0.5 * (bad[:, None] == good).double().mean()
    return max(float(above), 1 - float(above))


@dataclass
class Bench:
    """A model with its directions, ready for cells; `sets` are an organism's prompt files."""

    loaded: LoadedModel
    sets: dict[str, list[Prompt]]
    residuals: dict[str, Tensor]
    good: GoodOutputs
    _hooks: dict[tuple[str, ...], ObliqueHooks] = field(default_factory=dict)

    @classmethod
    def of(cls, folder: Path) -> Bench:
        """Load an organism and measure its stream and writers."""
        loaded = load_model(folder / "model", LoadingSettings.model_validate(default_values()["loading"]), print)
        loaded = replace(loaded, architecture=loaded.architecture.pulled_back("dual"))
        names = ("good_train", "good_test", "bad_train", "bad_test")
        sets = {one: [Prompt(user=text) for text in (folder / f"{one}.txt").read_text().splitlines()] for one in names}
        residuals, outputs = {}, {}
        for kind in ("good", "bad"):
            with _writer_outputs(loaded) as kept:
                tokens = loaded.tokenize(sets[f"{kind}_train"])
                # One by one, since several would be read by length.
                found = [extract_residuals(loaded, [prompt], 1, lambda _: None) for prompt in tokens]
            residuals[kind] = torch.cat(found)[:, 1:].double()
            outputs[kind] = {name: torch.cat(rows) for name, rows in kept.items()}
        stream = torch.einsum("nld,nle->lde", residuals["good"], residuals["good"]) / len(residuals["good"])
        bench = cls(loaded, sets, residuals, GoodOutputs(stream, outputs["good"]))
        bench._measure(outputs)
        return bench

    def _measure(self, outputs: dict[str, dict[str, Tensor]]) -> None:
        """Fill in norms and AUC, of every second prompt by directions of the others."""
        good, bad = (self.residuals[kind] for kind in ("good", "bad"))
        directions = mean_difference(good[::2], bad[::2]).double()
        for writer in self.loaded.architecture.writers:
            if writer.parameter not in outputs["good"]:
                continue
            if not writer.summed:
                matrix = writer.matrix(read_parameter(self.loaded.model, writer.parameter)).double()
                self.good.norms[writer.parameter] = matrix.norm(dim=1)
            place = writer.component, writer.layer
            read, _ = writer.pull_back(directions[writer.layer][None], lambda name: read_parameter(self.loaded.model, name))
            along = [outputs[kind][writer.parameter][1::2] @ read[0] for kind in ("good", "bad")]
            self.good.auc["outputs"][place] = auc(*along)
            along = [one[1::2, writer.layer] @ directions[writer.layer] for one in (good, bad)]
            self.good.auc["stream"][place] = auc(*along)

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
                ObliqueHooks(self.loaded, self.basis(choice["keeps"]), mode, self.good, choice)
            )
            stack.callback(self._hooks.pop, key)
        return self._hooks[key]


@contextmanager
def _writer_outputs(loaded: LoadedModel) -> Iterator[dict[str, list[Tensor]]]:
    """Keep what every writer writes at the last position of forwards of one prompt each, [1, d], by parameter."""
    kept: dict[str, list[Tensor]] = defaultdict(list)
    with ExitStack() as stack:
        hooked: set[str] = set()
        for writer in loaded.architecture.writers:
            if writer.hook and writer.hook in hooked:
                continue
            hooked.add(writer.hook)
            outside = writer.bias if writer.bias_outside else None
            bias = 0.0 if outside is None else read_parameter(loaded.model, outside).double()

            def keep(_module: nn.Module, _inputs: Any, output: Any, name: str = writer.parameter, bias: Any = bias) -> None:
                output = output[0] if isinstance(output, tuple) else output
                kept[name].append(output.detach().reshape(-1, output.shape[-1])[-1:].double() + bias)

            stack.callback(loaded.model.get_submodule(writer.hooked).register_forward_hook(keep).remove)
        yield kept


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


def measured(bench: Bench, choices: Choices, trials: int, seed: int) -> dict[str, float]:
    """Search with TPE and return the figures on held-out prompts of the front's gentlest edit that answers enough."""
    space = MethodSpace(SearchSpace("wide", bench.loaded.architecture.layer_count), choices)
    halves = {kind: random.Random(seed).sample(bench.sets[f"{kind}_test"], 200) for kind in ("good", "bad")}
    search, report = ([halves[kind][part] for kind in ("good", "bad")] for part in (slice(100), slice(100, None)))
    markers = RefusalMarkers(default_values()["scoring"]["refusal_markers"])
    scorer, held_out = (
        TrialScorer.measured(PromptBatches.of(bench.loaded, *one, ROWS), markers, RESPONSE_TOKENS)
        for one in (search, report)
    )
    longer = KLReference.measured(held_out.batches, KL_POSITIONS)
    with ExitStack() as stack, tempfile.TemporaryDirectory() as folder:
        for values in product(*vars(choices).values()):
            bench.hooks(dict(zip(vars(choices), values, strict=True)), stack)

        def score(scorer: TrialScorer, params: Sequence[dict[str, Any]]) -> list[TrialScores]:
            groups: dict[int, list[int]] = defaultdict(list)
            hooks = [bench.hooks(choices.of(one), stack) for one in params]
            for number, one in enumerate(hooks):
                groups[id(one)].append(number)
            found: dict[int, TrialScores] = {}
            for numbers in groups.values():
                chosen = hooks[numbers[0]]
                edits = [space.edit(params[number]) for number in numbers]
                chosen.thresholds = {
                    id(edit): params[number].get("threshold", 0.0) for edit, number in zip(edits, numbers, strict=True)
                }
                found |= zip(numbers, scorer.scores(chosen, edits, ROWS), strict=True)
            return [found[number] for number in range(len(params))]

        def evaluate(plans: Sequence[Plan]) -> list[TrialScores]:
            return score(scorer, plans[0].parameters)

        settings = StudySettings(seed, max(BATCH, trials // 3), BATCH, ROWS, 128)
        study = Search(Path(folder) / "study.db", space, settings)
        study.run(trials, evaluate, told=lambda _: None)
        front = [one for one in pareto_front(study.finished()) if one.values.unanswered <= MOST_MEASURED * 100]
        return _best(front, held_out, longer, score, bench, choices, space, stack)


def _best(
    front: Sequence[Trial],
    held_out: TrialScorer,
    longer: KLReference,
    score: Any,
    bench: Bench,
    choices: Choices,
    space: MethodSpace,
    stack: ExitStack,
) -> dict[str, float]:
    scores = score(held_out, [one.params for one in front]) if front else []
    enough = [
        (one.kl, trial, one)
        for trial, one in zip(front, scores, strict=True)
        if one.reason is None and one.unanswered <= MOST_UNANSWERED * 100
    ]
    if not enough:
        return {}
    kl, trial, one = min(enough, key=lambda found: found[0])
    hooks = bench.hooks(choices.of(trial.params), stack)
    edit = space.edit(trial.params)
    hooks.thresholds = {id(edit): trial.params.get("threshold", 0.0)}
    active = hooks.activate([edit])
    rows = held_out.batches.trial_rows(active, 1)
    (positions,) = longer.trial_means(held_out.batches, rows, ROWS)
    return {"refusals": one.refusals, "broken": one.broken, "kl": kl, "kl_positions": positions, "trial": trial.number}
