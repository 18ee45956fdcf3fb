"""The descent on a trained organism: its result, its end, and exact resumption."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from job.config.load import default_values
from job.data.prompts import Prompt
from job.directions.residuals import extract_residuals, read_tensors
from job.edits.hooks import ActiveEdits, Intervention
from job.gradient import problem as problems
from job.gradient import targets
from job.gradient.descent import Descent, DescentState, StageEnd, gradient_fault, worth_keeping
from job.gradient.hooks import DifferentiableEdits
from job.gradient.problem import LossWeights, Problem
from job.gradient.recipe import Recipe
from job.gradient.targets import TargetMaker
from job.model.loading import LoadedModel, load_model
from job.numerics.basis import Basis, DirectionPath
from job.numerics.directions import mean_difference
from job.numerics.gradient import EditVariables
from job.records import COMPONENTS, EditParameters, LearnedDirections, TrialScores
from job.text.refusal_markers import RefusalMarkers
from tests.helpers import loading

SHORT = Recipe(batch=8, first_stages=1, steps=3, stages=2)
GONE = TrialScores(refusals=0, kl=0.01)


@dataclasses.dataclass(frozen=True)
class Case:
    loaded: LoadedModel
    problem: Problem
    start: DescentState


@pytest.fixture(scope="module")
def case(organism: Path) -> Case:
    loaded = load_model(organism / "model", loading("float32"), lambda _: None)
    good, bad = (
        [Prompt(user=line) for line in (organism / f"{kind}_train.txt").read_text().splitlines()[:24]]
        for kind in ("good", "bad")
    )
    residuals = [extract_residuals(loaded, loaded.tokenize(one), 32, lambda _: None)[:, 1:] for one in (good, bad)]
    basis = Basis.single(mean_difference(*residuals))
    edits = DifferentiableEdits(loaded, "none", SHORT.largest)
    markers = RefusalMarkers(default_values()["scoring"]["refusal_markers"])
    problem = Problem.measured(loaded, edits, SHORT, 0, (good, bad), markers, 30, 32, 2.0)
    return Case(loaded, problem, DescentState.start(basis, SHORT))


def descended(
    case: Case,
    file: Path,
    advance: Callable[[int], None] = lambda _: None,
    scores: Sequence[TrialScores] = (GONE,),
    recipe: Recipe = SHORT,
) -> tuple[StageEnd, ...]:
    """Descend with these held-out scores of the stages, the last one of all further stages."""
    directions = case.start.variables.directions[0].float()
    basis, paths = Basis(directions, torch.ones(directions.shape[:2])), dict[str, DirectionPath]()
    hooks = Intervention(case.loaded.model, case.loaded.architecture, basis, "none", paths.__getitem__)

    def activate(variables: EditVariables) -> ActiveEdits:
        name = f"{len(paths):064x}"
        paths[name] = DirectionPath(variables.orthonormal().float())
        strengths = variables.strengths(SHORT.largest)[0].tolist()
        return hooks.activate(
            [
                EditParameters(
                    direction_index=None,
                    kernels={},
                    layer_strengths=dict(zip(COMPONENTS, strengths, strict=True)),
                    directions=LearnedDirections(sha256=name, position=0.0),
                )
            ]
        )

    with hooks:
        left = list(scores)
        problem = dataclasses.replace(case.problem, recipe=recipe)
        measure = lambda _: left.pop(0) if len(left) > 1 else left[0]  # noqa: E731
        descent = Descent(problem, measure, activate, 10, file, "k", lambda _: None)
        return descent.run(case.start, advance)


def same(one: EditVariables, other: EditVariables) -> bool:
    return torch.equal(one.logits, other.logits) and torch.equal(one.directions, other.directions)


def test_a_budget_ends_the_descent_after_a_stage(case: Case, tmp_path: Path) -> None:
    scores = TrialScores(refusals=9, kl=0.1)
    asked: list[float] = []

    def never(_: EditVariables) -> ActiveEdits:
        raise AssertionError("targets are made of edits without refusals only")

    def room(seconds: float) -> bool:
        asked.append(seconds)
        return False

    descent = Descent(case.problem, lambda _: scores, never, 10, tmp_path / "state", "k", lambda _: None, room)
    assert len(descent.run(case.start, lambda _: None)) == 1
    assert descent.cut_short
    assert len(asked) == 1
    assert asked[0] > 0


def test_prompts_that_are_refused_are_fitted_with_the_beginnings_of_answers(case: Case) -> None:
    problem = case.problem
    assert len(problem.bad) == len(problem.refusals) == len(problem.good) == len(problem.answers) == 24
    assert {len(refusal) for refusal in problem.refusals} == {SHORT.refusal_tokens}
    assert max(map(len, problem.answers)) == SHORT.kl_tokens
    said = {case.loaded.decode(refusal).split()[0] for refusal in problem.refusals}
    assert said <= {"Sorry,", "As", "I", "Many"}


def test_a_step_lowers_the_loss_and_memory_does_not_change_its_gradients(case: Case) -> None:
    weights = LossWeights(10.0, 0.02)
    variables = EditVariables(torch.full_like(case.start.variables.logits, -1.0), case.start.variables.directions)
    gradients, losses = case.problem.gradients(variables, 0, weights, 8)
    parts, _ = case.problem.gradients(variables, 0, weights, 3)
    torch.testing.assert_close(parts.logits, gradients.logits, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(parts.directions, gradients.directions, rtol=1e-3, atol=1e-4)
    whole = losses.refusal + 10 * losses.divergence + 0.02 * float(variables.strengths(SHORT.largest).mean())
    assert case.problem.loss(variables, 0, weights, 8) == pytest.approx(whole, rel=1e-5)
    ahead = EditVariables(variables.logits - 0.05 * gradients.logits.sign(), variables.directions)
    assert case.problem.loss(ahead, 0, weights, 8) < whole
    assert gradient_fault(case.problem, case.start, weights, pytest.fail) is None


def test_a_model_whose_heads_inputs_cannot_be_kept_has_the_same_gradients(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = LossWeights(10.0, 0.02)
    variables = EditVariables(torch.full_like(case.start.variables.logits, -1.0), case.start.variables.directions)
    gradients, losses = case.problem.gradients(variables, 0, weights, 8)
    monkeypatch.setattr(problems, "head_inputs", lambda *_: None)
    again, others = dataclasses.replace(case.problem, _kept_inputs={}).gradients(variables, 0, weights, 8)
    torch.testing.assert_close(again.logits, gradients.logits, rtol=1e-3, atol=1e-5)
    assert others.divergence == pytest.approx(losses.divergence, rel=1e-4)


def test_a_prefix_that_is_read_once_leaves_gradients_as_they_are(case: Case) -> None:
    weights, targets = LossWeights(10.0, 0.02), [[5, 6, 7], None] * 12
    variables = EditVariables(torch.full_like(case.start.variables.logits, -1.0), case.start.variables.directions)
    problem = case.problem
    assert len({prompt[0] for prompt in (*problem.bad, *problem.good)}) == 1
    whole, losses = problem.gradients(variables, 0, weights, 8, targets)
    once = dataclasses.replace(problem, shared=1, _kept_inputs={})
    found, others = once.gradients(variables, 0, weights, 8, targets)
    torch.testing.assert_close(found.logits, whole.logits, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(found.directions, whole.directions, rtol=1e-3, atol=1e-4)
    assert (others.refusal, others.divergence) == pytest.approx((losses.refusal, losses.divergence), rel=1e-4)


def test_the_problem_shares_the_first_tokens_of_all_its_prompts(case: Case) -> None:
    prompts = [[Prompt(user=f"What is the {thing} made of?")] * 8 for thing in ("map", "jinxed map")]
    markers = RefusalMarkers(default_values()["scoring"]["refusal_markers"])
    loaded, edits = case.loaded, DifferentiableEdits(case.loaded, "none", SHORT.largest)
    problem = Problem.measured(loaded, edits, SHORT, 0, (prompts[0], prompts[1]), markers, 30, 32, 2.0)
    read = {loaded.decode(prompt[: problem.shared]) for prompt in (*problem.bad, *problem.good)}
    assert problem.bad
    assert read == {"What is the"}


@pytest.mark.parametrize("after", [1, 4, 5])
def test_a_descent_that_was_interrupted_goes_on_to_the_same_numbers(case: Case, tmp_path: Path, after: int) -> None:
    whole = descended(case, tmp_path / "whole.safetensors")
    taken: list[int] = []

    def interrupt(steps: int) -> None:
        taken.append(steps)
        if sum(taken) == after:
            raise KeyboardInterrupt

    file = tmp_path / "state.safetensors"
    with pytest.raises(KeyboardInterrupt):
        descended(case, file, interrupt)
    again: list[int] = []
    ends = descended(case, file, again.append)
    # Stored work is not repeated: the fourth step, and the end of the stage after the third.
    assert (again[0], sum(again)) == ({1: 0, 4: 3, 5: 4}[after], 6)
    assert [end.steps for end in ends] == [3, 6]
    assert all(same(one.variables, other.variables) for one, other in zip(ends, whole, strict=True))
    assert (tmp_path / "whole.safetensors").read_bytes() == file.read_bytes()
    kept = read_tensors(file, "k")
    assert kept is not None
    state = DescentState.of(kept)
    assert (state.ends[1].beta, state.ends[1].scores) == (30.0, GONE)
    assert read_tensors(file, "another key") is None


def test_beta_stays_as_it_is_while_refusals_remain(case: Case, tmp_path: Path) -> None:
    ends = descended(case, tmp_path / "state.safetensors", scores=[TrialScores(refusals=5, kl=0.01)])
    assert [end.beta for end in ends] == [10.0, 10.0]


def counting_evasions(case: Case, monkeypatch: pytest.MonkeyPatch) -> Case:
    """Return the case where responses that begin with "Many" are taken for evasions."""
    monkeypatch.setattr(targets, "is_evasion", lambda _, text: text.startswith("Many"))
    markers = RefusalMarkers(default_values()["scoring"]["refusal_markers"], evasions=True)
    maker = dataclasses.replace(case.problem.maker, markers=markers)
    return dataclasses.replace(case, problem=dataclasses.replace(case.problem, maker=maker))


def test_evasive_responses_become_unlikely_also_after_an_interruption(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = dataclasses.replace(SHORT, first_stages=3, steps=6, stages=3)
    counting, seen = counting_evasions(case, monkeypatch), list[list[list[int] | None]]()
    evasions = TargetMaker.evasions

    def watched(maker: TargetMaker, edits: ActiveEdits) -> list[list[int] | None]:
        seen.append(evasions(maker, edits))
        return seen[-1]

    monkeypatch.setattr(TargetMaker, "evasions", watched)
    found = descended(counting, tmp_path / "found.safetensors", recipe=recipe)
    first = [(index, said[: recipe.refusal_tokens]) for index, said in enumerate(seen[0]) if said is not None]
    assert first
    count = len(seen)
    without = descended(case, tmp_path / "without.safetensors", recipe=recipe)
    assert len(seen) == count  # they are looked for only where they count
    assert same(found[0].variables, without[0].variables)
    with torch.no_grad():
        pushed, left = (float(case.problem._refusal_terms(e[-1].variables, first).sum()) for e in (found, without))
    assert pushed < 0.8 * left, (pushed, left)
    taken: list[int] = []

    def interrupt(steps: int) -> None:
        taken.append(steps)
        if sum(taken) == 14:
            raise KeyboardInterrupt

    file = tmp_path / "again.safetensors"
    with pytest.raises(KeyboardInterrupt):
        descended(counting, file, interrupt, recipe=recipe)
    descended(counting, file, recipe=recipe)
    assert file.read_bytes() == (tmp_path / "found.safetensors").read_bytes()


def left(refusals: int, kl: float) -> TrialScores:
    return TrialScores(refusals=refusals, kl=kl)


def gone(kl: float) -> TrialScores:
    return TrialScores(refusals=0, kl=kl)


@pytest.mark.parametrize(
    ("scores", "betas"),
    [
        ([gone(0.5), gone(0.4), gone(0.3), gone(0.2)], [10.0, 10.0, 30.0, 90.0]),
        # Rounding hides further gains, but not before β has grown once.
        ([gone(0.5), gone(0.5), gone(0.5), gone(0.1)], [10.0, 10.0, 30.0]),
        ([gone(0.5), gone(0.4), gone(0.4), gone(0.1)], [10.0, 10.0, 30.0]),
        ([left(5, 0.1), gone(0.4), gone(0.3), gone(0.3)], [10.0, 10.0, 30.0, 90.0]),
        # No edit gets off the ground while the KL divergence weighs too much.
        ([left(10, 0.0), left(10, 0.0), left(9, 0.1), gone(0.1)], [10.0, 10 / 3, 10 / 9, 10 / 9]),
        ([left(10, 0.0), gone(0.3), gone(0.2), gone(0.1)], [10.0, 10 / 3, 10.0, 30.0]),
    ],
)
def test_beta_shrinks_while_all_is_refused_and_grows_after_two_stages_until_kl_no_longer_falls(
    case: Case, tmp_path: Path, scores: list[TrialScores], betas: list[float]
) -> None:
    recipe = dataclasses.replace(SHORT, first_stages=2, steps=1, stages=4)
    ends = descended(case, tmp_path / "state.safetensors", scores=scores, recipe=recipe)
    assert [end.beta for end in ends] == pytest.approx(betas)


@pytest.mark.parametrize(
    ("scores", "stages"),
    [
        # One of ten prompts stays refused, so β stays; the KL divergence falls by 20 % and more, or by less.
        ([left(1, 0.5), left(1, 0.2), left(1, 0.16), left(1, 0.12), left(1, 0.12)], 5),
        ([left(1, 0.5), left(1, 0.2), left(1, 0.17), left(1, 0.1)], 3),
        ([left(1, 0.5), left(1, 0.49), left(1, 0.1), left(1, 0.05), left(1, 0.04)], 5),
        # None is left, so β grows and a small gain is one.
        ([left(0, 0.5), left(0, 0.49), left(0, 0.48), left(0, 0.47), left(0, 0.46)], 5),
        # Refusals fall, or many are left.
        ([left(1, 0.5), left(1, 0.2), left(0, 0.3), left(0, 0.1), left(0, 0.05)], 5),
        ([left(5, 0.5), left(5, 0.5), left(5, 0.6), left(5, 0.6), left(1, 0.6)], 5),
    ],
)
def test_a_descent_ends_where_a_stage_gains_next_to_nothing(
    case: Case, tmp_path: Path, scores: list[TrialScores], stages: int
) -> None:
    recipe = dataclasses.replace(SHORT, first_stages=2, steps=1, stages=5)
    assert len(descended(case, tmp_path / "state.safetensors", scores=scores, recipe=recipe)) == stages


def end(refusals: int, broken: int = 0) -> StageEnd:
    nothing = EditVariables(torch.zeros(1), torch.zeros(1))
    return StageEnd(nothing, 1.0, 1, TrialScores(refusals=refusals, broken=broken, kl=0.1))


@pytest.mark.parametrize(
    ("ends", "kept"),
    [
        ([end(90), end(3), end(0), end(1), end(9)], 4),
        ([end(90), end(80)], 2),
        ([end(0), end(0, broken=5), end(0)], 1),
        ([end(2), end(2)], 2),
    ],
)
def test_the_path_ends_before_refusals_or_broken_answers_come_back(ends: list[StageEnd], kept: int) -> None:
    assert len(worth_keeping(ends, 100)) == kept


def test_a_model_without_gradients_is_told(case: Case) -> None:
    class Detached(DifferentiableEdits):
        """Simulates a kernel without a backward."""

        def _compiled(self, *arguments: object) -> object:
            edit = super()._compiled(*arguments)  # type: ignore[arg-type]
            return dataclasses.replace(edit, write=edit.write.detach(), read=edit.read.detach())

    broken = dataclasses.replace(case.problem, edits=Detached(case.loaded, "none", SHORT.largest))
    assert gradient_fault(broken, case.start, LossWeights(10.0, 0.02), pytest.fail) is not None
