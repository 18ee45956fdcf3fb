"""Losses, variables and the optimiser of an edit found by gradient."""

from __future__ import annotations

import math

import pytest
import torch
from torch.autograd import gradcheck

from job.numerics.ablation import RowNormalization, WriterEdit
from job.numerics.basis import orthonormal_in
from job.numerics.gradient import (
    AdamState,
    EditVariables,
    adam_step,
    answer_divergence,
    minibatch,
    orthonormal_rows,
    refusal_term,
    sequence_log_probabilities,
    writer_edit,
)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("mode", ["none", "pre", "full", "column"])
def test_gradients_of_an_edited_output_are_those_of_finite_differences(mode: RowNormalization, count: int) -> None:
    width, inputs = 6, 5
    weight, x = random(width, inputs, seed=1), random(4, inputs, seed=2)
    weight[2] = 0
    weight[:, 3] = 0

    def output(directions: torch.Tensor, strengths: torch.Tensor) -> torch.Tensor:
        edit = writer_edit(None if mode == "none" else weight, orthonormal_rows(directions), strengths, mode)
        return torch.stack([through(edit, trial, x, weight) for trial in range(2)])

    directions, strengths = random(2, count, width, seed=3), random(2, count, seed=4).sigmoid()
    assert gradcheck(output, (directions.requires_grad_(), strengths.requires_grad_()))


def through(edit: WriterEdit, trial: int, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return a writer's output for inputs [t, i] under one of the edits."""
    scaled = x if edit.input_scale is None else x * edit.input_scale[trial]
    y = scaled @ weight.T
    y = y - (y @ edit.output_read[trial].T) @ edit.output_write[trial]
    return y if edit.output_scale is None else y * edit.output_scale[trial]


def test_directions_are_made_orthonormal_in_their_order_and_empty_ones_stay_empty() -> None:
    vectors = random(2, 3, 8)
    vectors[1, 2] = 0
    found = orthonormal_rows(vectors)
    torch.testing.assert_close(found[0] @ found[0].T, torch.eye(3, dtype=torch.float64))
    torch.testing.assert_close(found[1] @ found[1].T, torch.diag(torch.tensor([1.0, 1, 0], dtype=torch.float64)))
    torch.testing.assert_close(found[0, 0], vectors[0, 0] / vectors[0, 0].norm())
    vectors.requires_grad_()
    orthonormal_rows(vectors).square().sum().backward()
    assert vectors.grad is not None
    assert bool(vectors.grad.isfinite().all())


def test_losses_are_what_their_definitions_say_and_padding_has_no_part() -> None:
    base, edited = random(2, 3, 7, seed=1), random(2, 3, 7, seed=2)
    real = torch.tensor([[True, True, False], [True, True, True]])
    p, q = base.softmax(-1), edited.softmax(-1)
    by_position = (p * (p / q).log()).sum(-1)
    expected = (by_position[:, 0] + torch.stack([by_position[0, :2].mean(), by_position[1].mean()])) / 2
    torch.testing.assert_close(answer_divergence(base, edited, real), expected)
    tokens = torch.tensor([[1, 2, 0], [3, 4, 5]])
    chosen = torch.stack([q[0, 0, 1] * q[0, 1, 2], q[1, 0, 3] * q[1, 1, 4] * q[1, 2, 5]]).log()
    found = sequence_log_probabilities(edited, tokens, real)
    torch.testing.assert_close(found, chosen)
    torch.testing.assert_close(refusal_term(found, 6.0), (1 + (found + 6).exp()).log())
    changed = edited.clone()
    changed[0, 2] = 99.0
    torch.testing.assert_close(answer_divergence(base, changed, real), expected)


def test_adam_descends_and_turns_directions_by_an_angle_whatever_their_width() -> None:
    for width in (16, 1024):
        start = EditVariables(torch.zeros(1, 2, 3, 1), orthonormal_rows(random(1, 3, 1, width)))
        gradients = EditVariables(torch.ones(1, 2, 3, 1), random(1, 3, 1, width, seed=5))
        moved, state = adam_step(start, gradients, AdamState.zero(start), 0.4, 0.1)
        torch.testing.assert_close(moved.logits, start.logits - 0.4, rtol=1e-5, atol=0)
        angles = (moved.directions * start.directions).sum(-1).clamp(-1, 1).acos()
        assert bool(((angles > 0.06) & (angles < 0.11)).all()), angles
        assert state.steps == 1
    kept, _ = adam_step(start, gradients, AdamState.zero(start), 0.4, 0.0)
    assert torch.equal(kept.directions, start.directions)


def test_adam_is_torchs() -> None:
    start = EditVariables(random(1, 2, 3, 1), orthonormal_rows(random(1, 3, 1, 8)))
    theirs = start.logits.clone().requires_grad_()
    optimizer = torch.optim.Adam([theirs], lr=0.3)
    ours, state = start, AdamState.zero(start)
    for step in range(5):
        gradient = random(1, 2, 3, 1, seed=step)
        theirs.grad = gradient.clone()
        optimizer.step()
        ours, state = adam_step(ours, EditVariables(gradient, torch.zeros_like(start.directions)), state, 0.3, 0.0)
    torch.testing.assert_close(ours.logits, theirs.detach())


def test_a_layer_without_a_direction_keeps_none() -> None:
    directions = orthonormal_rows(random(1, 3, 2, 8))
    directions[0, 1, 1] = 0
    start = EditVariables(torch.zeros(1, 2, 3, 2), directions)
    gradients = EditVariables(torch.zeros(1, 2, 3, 2), random(1, 3, 2, 8, seed=1))
    moved, _ = adam_step(start, gradients, AdamState.zero(start), 0.4, 0.1)
    assert not bool(moved.directions[0, 1, 1].any())
    assert bool((moved.directions[0, 1, 0] != directions[0, 1, 0]).all())


def test_a_minibatch_follows_from_seed_and_step_alone() -> None:
    assert minibatch(0, 3, "bad", 40, 12) == minibatch(0, 3, "bad", 40, 12)
    assert len(set(minibatch(0, 3, "bad", 40, 12))) == 12
    others = [minibatch(1, 3, "bad", 40, 12), minibatch(0, 4, "bad", 40, 12), minibatch(0, 3, "good", 40, 12)]
    assert all(other != minibatch(0, 3, "bad", 40, 12) for other in others)
    assert sorted(minibatch(0, 0, "bad", 5, 12)) == [0, 1, 2, 3, 4]


def test_strengths_stay_between_nothing_and_the_largest() -> None:
    variables = EditVariables(torch.tensor([-math.inf, 0.0, math.inf]).view(1, 1, 3, 1), torch.zeros(1, 3, 1, 2))
    assert variables.strengths(1.5).flatten().tolist() == [0.0, 0.75, 1.5]


@pytest.mark.parametrize("weighted", [False, True])
def test_nearly_equal_directions_are_one_as_in_the_search(weighted: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    first, other, noise = torch.randn(3, 12, generator=generator, dtype=torch.float64)
    metric = torch.rand(12, generator=generator, dtype=torch.float64) + 0.5 if weighted else None
    vectors = torch.stack([first, 2 * first + 1e-6 * noise, other, torch.zeros_like(first)])
    found = orthonormal_rows(vectors, metric)
    gram = vectors @ (vectors if metric is None else vectors * metric).T
    expected = orthonormal_in(torch.eye(4, dtype=torch.float64), gram) @ vectors
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert not found[1].any()
    assert not found[3].any()
