"""The planned memory of the descent against what autograd saves, and against the peak of all live tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from job.architectures.structure import discover
from job.gradient.hooks import DifferentiableEdits
from job.gradient.reading import ForcedAnswers, answer_logits
from job.model.loading import LoadedModel
from job.numerics.gradient import EditVariables, answer_divergence
from job.preflight.checks import GIB
from job.preflight.device_map import DevicePlan
from job.preflight.gradient_memory import (
    DescentRow,
    GradientPlan,
    Mode,
    gradient_check,
    gradient_plan,
    peak_bytes,
    saved_bytes,
    weight_bytes,
)
from tests.unit.preflight.test_activation_memory import LiveBytes, build, facts_of
from tests.unit.preflight.test_memory_plan import CODER

ROWS, TOKENS, ANSWER = 2, 48, 8


class Step:
    """The divergence term of a step on prompts of unequal length, as a loss of an edit's variables."""

    def __init__(self, model: PreTrainedModel, mode: Mode, rows: int = ROWS, shared: int = 0) -> None:
        model.requires_grad_(False)
        self.model = model
        loaded = LoadedModel(Path(), model, cast(Any, None), discover(model), "float32")
        layers, width = loaded.architecture.layer_count, loaded.architecture.width
        logits = torch.full((1, 2, layers, 1), -1.0, dtype=torch.float64)
        self.variables = EditVariables(logits, torch.randn(1, layers, 1, width, dtype=torch.float64)).with_gradients()
        self.edits = DifferentiableEdits(loaded, mode, 1.5)
        longest = TOKENS - ANSWER + 1
        prompts = [[5] * (longest - 9 * (row > 0)) for row in range(rows)]
        self.forced = ForcedAnswers.of(prompts, [[3] * ANSWER] * rows, loaded.device, shared)

    def loss(self) -> Tensor:
        with torch.no_grad():
            base = answer_logits(self.model, self.forced)
        with self.edits.applied(self.variables, [0] * len(self.forced.tokens)):
            logits = answer_logits(self.model, self.forced)
        return answer_divergence(base, logits, self.forced.real).sum()

    def saved(self) -> int:
        """Return the bytes of the distinct storages that the graph keeps, without parameters and buffers."""
        known = {one.untyped_storage()._cdata for one in (*self.model.parameters(), *self.model.buffers())}
        kept: dict[int, torch.UntypedStorage] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in known:
                kept[storage._cdata] = storage  # alive: its address names it
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = self.loss()
        assert loss.requires_grad
        return sum(storage.nbytes() for storage in kept.values())

    def peak(self) -> int:
        with LiveBytes(self.model) as live:
            self.loss().backward()  # type: ignore[no-untyped-call]
        return live.peak


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("family", "mode", "changes"),
    [
        ("llama", "none", {}),
        ("llama", "pre", {}),
        ("llama", "full", {}),
        ("llama", "column", {}),
        ("llama", "none", {"num_key_value_heads": 8, "intermediate_size": 700}),
        ("qwen3", "none", {"head_dim": 32, "intermediate_size": 64}),
        ("qwen2", "none", {"num_hidden_layers": 6, "tie_word_embeddings": True}),
        ("llama", "none", {"vocab_size": 8000}),
    ],
)
def test_what_a_step_keeps_and_its_peak(family: str, mode: Mode, changes: dict[str, Any], dtype: torch.dtype) -> None:
    model = build(family, dtype, **changes)
    facts = facts_of(model)
    row = DescentRow(tokens=TOKENS, answer_tokens=ANSWER, dtype_bytes=dtype.itemsize, mode=mode)
    step = Step(model, mode)
    once = weight_bytes(facts, mode)
    distributions = 2 * ANSWER * facts.vocab * 4
    assert ROWS * (saved_bytes(facts, row) + distributions) + once == pytest.approx(step.saved(), rel=0.03)
    assert ROWS * peak_bytes(facts, row) + once == pytest.approx(step.peak(), rel=0.1)


@pytest.mark.parametrize(("rows", "most"), [(1, 1.0), (8, 0.75)])
def test_a_shared_prefix_takes_no_more_than_planned(rows: int, most: float) -> None:
    model = build("llama", torch.bfloat16)
    row = DescentRow(tokens=TOKENS, answer_tokens=ANSWER)
    assert Step(model, "none", rows, shared=24).peak() < most * rows * peak_bytes(facts_of(model), row)


def device(free: float, layers: int = 64, label: str = "cuda:0", weights: float = 62 * GIB) -> DevicePlan:
    return DevicePlan(
        device=label,
        name="card",
        layers=layers,
        weights=int(weights),
        cache=0,
        activations=0,
        margin=0,
        loading_peak=0,
        free=int(free),
    )


def test_rows_are_halved_until_they_fit_as_before_the_first_step() -> None:
    row = DescentRow.longest(57, 2, "none")
    assert row.tokens == 64
    one = peak_bytes(CODER, row)
    # By hand, 64 tokens: 4 float32 of 5120, 3 of 27648 in bfloat16, and 4 of 5120 in bfloat16 for 63 of 64 layers.
    assert one == pytest.approx(64 * (64 * (4 * 4 * 5120 + 6 * 27648) + 63 * 8 * 5120), rel=0.05)
    whole = gradient_plan(CODER, [device(62 * GIB + 26 * one / 0.9 + 2 * GIB)], row, offloaded=False)
    assert (whole.rows, whole.row_bytes, whole.fault) == (24, one, None)
    half = gradient_plan(CODER, [device(62 * GIB + 13 * one / 0.9 + 0.6 * GIB)], row, offloaded=False)
    assert half.rows == 12
    # A GPU is tried up to its last byte with one prompt, RAM is not.
    tight = 62 * GIB + 600 * 2**20 + 1.05 * one
    assert gradient_plan(CODER, [device(tight)], row, offloaded=False).rows == 1
    assert gradient_plan(CODER, [device(62 * GIB + 1.05 * one, label="cpu")], row, offloaded=False).rows == 0
    # On two devices each keeps its layers' part.
    split = gradient_plan(CODER, [device(40 * GIB, 32, f"cuda:{n}", 31 * GIB) for n in (0, 1)], row, offloaded=False)
    assert split.row_bytes < 0.6 * one
    assert split.rows > half.rows / 2


def test_without_room_for_one_prompt_the_search_uses_tpe() -> None:
    row = DescentRow.longest(57, 2, "none")
    none = gradient_plan(CODER, [device(62.5 * GIB, label="cpu")], row, offloaded=False)
    assert none.rows == 0
    check = gradient_check(none, "auto")
    assert check.status == "warn"
    assert "the search will use TPE" in check.measured
    assert "the job will stop before its search" in gradient_check(none, "gradient").measured
    offloaded = gradient_plan(CODER, [device(200 * GIB)], row, offloaded=True)
    assert "weights are offloaded: the search will use TPE" in gradient_check(offloaded, "gradient").measured
    fits = gradient_check(GradientPlan(rows=6, row_bytes=GIB), "auto")
    assert (fits.status, fits.measured) == ("ok", "6 prompts a forward pass of the gradient descent, 1.0 GiB each")
