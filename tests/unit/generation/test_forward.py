"""A row's response depends only on its own trial and prompt, whatever else is in the batch."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from transformers import PreTrainedModel

from job.architectures.structure import discover
from job.edits.hooks import ActiveEdits, Intervention
from job.generation.answer import Answer
from job.generation.forward import RowTrials, last_logits, shared_prefix
from job.generation.greedy import greedy_answers
from job.records import READ_TOKENS, EditParameters, KernelParameters
from tests.integration.edits.test_hooks import basis_for, wide_basis_for
from tests.zoo import tiny_model

LIMIT = 7
PREFIX = [5, 9, 11, 13]
# Minimum lead of the best token over the second; below it rounding may choose either.
TIE = 1e-3


def edit(index: float | None, attention: float, mlp: float) -> EditParameters:
    kernels = {
        name: KernelParameters(max_weight=weight, max_weight_position=1, min_weight=weight, min_weight_distance=9)
        for name, weight in (("attention", attention), ("mlp", mlp))
    }
    return EditParameters(direction_index=index, kernels=kernels)


# Strong enough that each trial's responses differ.
EDITS = [edit(0.0, 8.0, 0.0), edit(None, -6.0, 9.0), edit(1.5, 4.0, -9.0), edit(2.0, 0.0, 0.0)]


@dataclass(frozen=True)
class Row:
    """A prompt of a batch.

    Attributes:
        trial: The trial that it is answered under.
        prompt: Its tokens.
        length: The length at which its response is decided, LIMIT + 1 for never.
        opening: The token whose odds of opening the response are wanted.
    """

    trial: int
    prompt: list[int]
    length: int
    opening: int


def batch(seed: int) -> tuple[list[Row], int | None, bool]:
    """Return random rows, the token limit of a prefill forward (None: no limit), and whether they share a prefix."""
    choice = random.Random(seed)
    shared = choice.random() < 0.5
    sizes = [choice.randint(1, 9) for _ in range(choice.randint(2, 9))]
    # A refusal that opens with a marker is decided at its first token. Prompts are read in order of length, so a bound
    # on
    # the length decides all rows of some forwards and none of others.
    bound, longer = choice.randint(0, 9), choice.random() < 0.5
    rows = [
        Row(
            trial=choice.randrange(len(EDITS)),
            prompt=(PREFIX if shared else []) + [choice.randint(3, 96) for _ in range(size)],
            length=1 if (size > bound) == longer else choice.choice([1, 2, 3, 5, LIMIT, LIMIT + 1, LIMIT + 1]),
            opening=choice.randint(3, 96),
        )
        for size in sizes
    ]
    return rows, choice.choice([None, 1, 8, 20, 40]), shared


def row(trial: int, tokens: int, length: int = LIMIT + 1) -> Row:
    return Row(trial, list(range(20, 20 + tokens)), length, 7)


# Prompts are read in three parts; all rows but those of the first are decided at their first token.
ONE_PART_GOES_ON = [
    # The part that is read last has the same number of rows, of other trials, ...
    ([row(0, 3), row(1, 3), row(2, 6, 1), row(3, 6, 1), row(3, 9, 1), row(2, 9, 1)], 18, False),
    # ... or another number of rows.
    ([row(0, 3), row(1, 3), row(2, 3), row(3, 7, 1), row(2, 9, 1)], 9, False),
]


def together(model: PreTrainedModel, active: ActiveEdits, rows: Sequence[Row], shared: bool) -> list[Answer]:
    prefix = shared_prefix(model, PREFIX, len(EDITS), active) if shared else None
    return greedy_answers(
        model,
        [row.prompt for row in rows],
        limit=LIMIT,
        end_tokens=(),
        openings=[row.opening for row in rows],
        decided=lambda index, tokens: len(tokens) == rows[index].length,
        rows=RowTrials(torch.tensor([row.trial for row in rows]), active, prefix),
    )


def alone(model: PreTrainedModel, hooks: Intervention, edit: EditParameters, row: Row, found: Answer) -> bool:
    """Return whether a response equals its row's alone, up to the first tie: without caches, parts and batches.

    One forward reads the prompt and the response. Each token of a correct response is the best after those before it.
    """
    if len(found.tokens) != min(row.length, LIMIT) or found.decided != (len(found.tokens) == row.length):
        return False
    active = hooks.activate([edit])
    with active.bind(torch.zeros(1, dtype=torch.long)):
        (logits,) = last_logits(model, [[*row.prompt, *found.tokens[:-1]]], len(found.tokens)).float()
    own = logits[0].log_softmax(-1)[row.opening]
    if float(own - torch.log(-torch.expm1(own))) != pytest.approx(found.opening, rel=1e-3, abs=1e-3):
        return False
    best = logits.topk(2)
    leads = (best.values[:, 0] - best.values[:, 1]).tolist()
    for step, (lead, token) in enumerate(zip(leads, best.indices[:, 0].tolist(), strict=True)):
        if lead < TIE:
            return True
        if found.tokens[step] != token or abs(found.margins[step] - lead) > TIE:
            return False
    return True


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("batches", [8, pytest.param(60, marks=pytest.mark.full("families"))])
@pytest.mark.parametrize(
    ("family", "mode"), [("llama", "none"), ("llama", "full"), ("gemma2", "none"), ("mamba", "none")]
)
def test_a_row_is_answered_as_its_own_trial_alone(family: str, mode: str, batches: int) -> None:
    model = tiny_model(family)
    architecture = discover(model)
    basis = (wide_basis_for if family == "gemma2" else basis_for)(model)
    edits = [e.model_copy(update={"strengths": (1.0, 0.7, 0.2)}) for e in EDITS] if family == "gemma2" else EDITS
    usual = READ_TOKENS["cpu"]

    try:
        with Intervention(model, architecture, basis, mode) as hooks:
            for rows, tokens, shared in [*ONE_PART_GOES_ON, *map(batch, range(batches))]:
                READ_TOKENS["cpu"] = tokens if tokens is not None else 10**9
                answers = together(model, hooks.activate(edits), rows, shared and family == "llama")
                for own, answer in zip(rows, answers, strict=True):
                    assert alone(model, hooks, edits[own.trial], own, answer), (rows, tokens, shared, own)
    finally:
        READ_TOKENS["cpu"] = usual
