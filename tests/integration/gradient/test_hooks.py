"""Gradients through whole models; the edit found is the edit that the search measures."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    PreTrainedModel,
)

from job.architectures.structure import discover
from job.architectures.tiny_model import small_twin
from job.edits.hooks import Intervention
from job.generation.forward import RowTrials, first_logits
from job.generation.kv_cache import writable_slots
from job.gradient.hooks import DifferentiableEdits
from job.gradient.reading import ForcedAnswers, answer_logits, head_inputs
from job.model.loading import LoadedModel
from job.numerics.ablation import RowNormalization
from job.numerics.basis import Basis, DirectionPath
from job.numerics.gradient import (
    EditVariables,
    answer_divergence,
    orthonormal_rows,
    refusal_term,
    sequence_log_probabilities,
)
from job.records import COMPONENTS, EditParameters, LearnedDirections, PullBack
from tests.decoders import tiny_config

LARGEST = 1.5
PROMPTS = [[7, 8, 9, 10, 11], [12, 13, 14], [9, 30], [5, 6, 7, 8]]
ANSWERS = [[3, 4, 5], [6], [7, 8, 9, 10], [11, 12]]
SIZES: dict[str, Any] = {
    "vocab_size": 48,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
FAMILIES: dict[str, Any] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True)),
    "olmo2": lambda: Olmo2ForCausalLM(Olmo2Config(**SIZES)),
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**SIZES, head_dim=8, sliding_window=4)),
    "mixtral": lambda: MixtralForCausalLM(
        MixtralConfig(**SIZES, num_local_experts=3, num_experts_per_tok=3, experts_implementation="eager")
    ),
    # A bias added later; convolutions between writers and the stream; a stream that is scaled.
    **{name: partial(small_twin, tiny_config(name)) for name in ("gpt_neox_japanese", "inkling_text", "doge")},
}


class DoubleNorm(nn.Module):
    """A family's RMS norm in its input's precision; transformers' own rounds it to float32."""

    def __init__(self, norm: nn.Module, offset: float) -> None:
        super().__init__()
        self.weight, self.offset = norm.weight, offset

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.weight + self.offset) * x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()


def in_double(model: PreTrainedModel) -> None:
    for name, module in list(model.named_modules()):
        if type(module).__name__.endswith("RMSNorm"):
            holder, _, own = name.rpartition(".")
            setattr(model.get_submodule(holder), own, DoubleNorm(module, float("Gemma" in type(module).__name__)))


def loaded_random(family: str, dtype: torch.dtype = torch.float64, pulled_back: PullBack = "gain") -> LoadedModel:
    """Return a small random model with random gains and biases."""
    torch.manual_seed(0)
    model: PreTrainedModel = FAMILIES[family]()
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.1)
    model = model.to(dtype).eval()
    model.requires_grad_(False)
    architecture = discover(model).pulled_back(pulled_back)
    if dtype == torch.float64:
        in_double(model)
    tokenizer = cast(Any, None)  # only tokens are used here
    return LoadedModel(Path(), model, tokenizer, architecture, str(dtype).removeprefix("torch."))


def some_variables(loaded: LoadedModel, edits: int, count: int) -> EditVariables:
    generator = torch.Generator().manual_seed(1)
    layers, width = loaded.architecture.layer_count, loaded.architecture.width
    logits = torch.randn(edits, 2, layers, count, generator=generator, dtype=torch.float64)
    return EditVariables(logits, torch.randn(edits, layers, count, width, generator=generator, dtype=torch.float64))


def loss(loaded: LoadedModel, edits: DifferentiableEdits, variables: EditVariables, base: torch.Tensor) -> torch.Tensor:
    """Return a loss over the rows of all edits, each edit weighted differently."""
    count = len(variables.logits)
    forced = ForcedAnswers.of(PROMPTS * count, ANSWERS * count, loaded.device)
    trials = [trial for trial in range(count) for _ in PROMPTS]
    with edits.applied(variables, trials):
        logits = answer_logits(loaded.model, forced)
    weights = torch.tensor([1.0 + trial for trial in trials], dtype=torch.float64)
    refusal = refusal_term(sequence_log_probabilities(logits, forced.answers, forced.real), 6.0)
    kl = answer_divergence(base.repeat(count, 1, 1), logits, forced.real)
    return (weights * (refusal + 3 * kl)).mean() + 0.02 * variables.strengths(LARGEST).mean()


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize(
    ("family", "mode", "pulled_back"),
    [
        *((family, mode, "gain") for family in ("llama", "olmo2") for mode in ("none", "pre", "full", "column")),
        *(("olmo2", mode, "dual") for mode in ("none", "pre", "full", "column")),
        ("mixtral", "none", "gain"),
    ],
)
def test_gradients_are_those_of_finite_differences_with_two_edits_in_a_batch(
    family: str, mode: RowNormalization, pulled_back: PullBack, count: int
) -> None:
    loaded = loaded_random(family, pulled_back=pulled_back)
    edits, variables = DifferentiableEdits(loaded, mode, LARGEST), some_variables(loaded, 2, count)
    base = answer_logits(loaded.model, ForcedAnswers.of(PROMPTS, ANSWERS, loaded.device)).detach()
    watched = variables.with_gradients()
    loss(loaded, edits, watched, base).backward()
    gradients = watched.gradients()
    assert bool(gradients.logits.abs().min() > 0)
    # Routers compute in float32 in any model.
    step, tolerance = (1e-2, {"rel": 1e-2, "abs": 2e-4}) if family == "mixtral" else (1e-5, {"rel": 1e-6})
    generator = torch.Generator().manual_seed(2)
    for _ in range(4):
        along = EditVariables(
            torch.randn(variables.logits.shape, generator=generator, dtype=torch.float64),
            torch.randn(variables.directions.shape, generator=generator, dtype=torch.float64),
        )
        ahead, behind = (loss(loaded, edits, moved(variables, along, sign * step), base).item() for sign in (1, -1))
        slope = (gradients.logits * along.logits).sum() + (gradients.directions * along.directions).sum()
        assert slope.item() == pytest.approx((ahead - behind) / (2 * step), **tolerance)


def moved(variables: EditVariables, along: EditVariables, step: float) -> EditVariables:
    return EditVariables(variables.logits + step * along.logits, variables.directions + step * along.directions)


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize(
    ("family", "mode", "pulled_back"),
    [
        ("llama", "none", "gain"),
        ("llama", "full", "gain"),
        ("llama", "column", "gain"),
        ("gemma2", "pre", "gain"),
        ("gemma2", "column", "gain"),
        *(("gemma2", mode, "dual") for mode in ("none", "pre", "full", "column")),
        ("mixtral", "none", "gain"),
        ("gpt_neox_japanese", "full", "gain"),
        *(("inkling_text", "none", how) for how in ("gain", "dual")),
        ("doge", "column", "gain"),
    ],
)
def test_the_edit_found_is_the_edit_that_the_search_measures(
    family: str, mode: RowNormalization, pulled_back: PullBack, count: int
) -> None:
    loaded = loaded_random(family, torch.float32, pulled_back)
    variables = some_variables(loaded, 2, count)
    edits = DifferentiableEdits(loaded, mode, LARGEST)
    prompts = PROMPTS * 2
    forced = ForcedAnswers.of(prompts, [[0]] * len(prompts), loaded.device)
    with edits.applied(variables, [0] * 4 + [1] * 4), torch.no_grad():
        found = answer_logits(loaded.model, forced)[:, 0]
    path = DirectionPath(orthonormal_rows(variables.directions).float())
    basis = Basis(path.directions[0], torch.ones(path.directions.shape[1:3]))
    parameters = [
        EditParameters(
            direction_index=None,
            kernels={},
            layer_strengths=dict(zip(COMPONENTS, strengths.tolist(), strict=True)),
            directions=LearnedDirections(sha256="1" * 64, position=float(stage)),
        )
        for stage, strengths in enumerate(variables.strengths(LARGEST))
    ]
    with Intervention(loaded.model, loaded.architecture, basis, mode, lambda _: path) as intervention:
        rows = RowTrials(torch.arange(2).repeat_interleave(4), intervention.activate(parameters))
        measured = first_logits(loaded.model, prompts, rows)
    torch.testing.assert_close(found, measured, rtol=0, atol=5e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_the_head_reads_of_single_prompts_gives_their_logits_beside_an_edit(family: str) -> None:
    loaded = loaded_random(family, torch.float32)
    model, variables = loaded.model, some_variables(loaded, 1, 1)
    edits = DifferentiableEdits(loaded, "none", LARGEST)
    forced = ForcedAnswers.of(PROMPTS, ANSWERS, loaded.device)
    alone = [
        head_inputs(model, ForcedAnswers.of([prompt], [answer], loaded.device))
        for prompt, answer in zip(PROMPTS, ANSWERS, strict=True)
    ]
    known = pad_sequence([inputs[0] for inputs in alone if inputs is not None], batch_first=True)
    base = answer_logits(model, forced)
    with edits.applied(variables, [0] * len(PROMPTS)):
        edited, beside = answer_logits(model, forced, known).split(len(PROMPTS))
        without = answer_logits(model, forced)
    torch.testing.assert_close(edited, without, rtol=0, atol=5e-5)
    torch.testing.assert_close(beside[forced.real], base[forced.real], rtol=0, atol=5e-5)
    assert (edited - base)[forced.real].abs().max() > 1e-3


# The convolutions of inkling_text keep a state without slots: nothing is shared there.
@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - {"inkling_text"}))
def test_a_prefix_read_once_has_the_gradients_of_one_read_in_every_row(family: str) -> None:
    loaded = loaded_random(family, torch.float32)
    shared = min(3, writable_slots(loaded.model))
    assert shared > 0
    prompts = [[20, 21, 22, *prompt] for prompt in PROMPTS]
    variables, edits = some_variables(loaded, 1, 2), DifferentiableEdits(loaded, "none", LARGEST)
    read = list[int]()
    count = loaded.model.get_input_embeddings().register_forward_pre_hook(
        lambda _, given: read.append(given[0].numel())
    )

    def gradients(shared: int) -> tuple[torch.Tensor, EditVariables]:
        watched = variables.with_gradients()
        forced = ForcedAnswers.of(prompts, ANSWERS, loaded.device, shared)
        with edits.applied(watched, [0] * len(prompts)):
            logits = answer_logits(loaded.model, forced)
        refusal_term(sequence_log_probabilities(logits, forced.answers, forced.real), 6.0).sum().backward()
        return logits.detach()[forced.real], watched.gradients()

    (logits, whole), (again, found) = gradients(0), gradients(shared)
    count.remove()
    torch.testing.assert_close(again, logits, rtol=0, atol=5e-5)
    torch.testing.assert_close(found.logits, whole.logits, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(found.directions, whole.directions, rtol=1e-3, atol=1e-5)
    assert sum(read) == 2 * read[0] - (len(prompts) - 1) * shared


def test_the_head_computes_the_answers_positions_alone_and_padding_changes_nothing() -> None:
    loaded = loaded_random("llama")
    together = answer_logits(loaded.model, ForcedAnswers.of(PROMPTS, ANSWERS, loaded.device))
    assert together.shape == (4, 4, 48)
    for row, (prompt, answer) in enumerate(zip(PROMPTS, ANSWERS, strict=True)):
        alone = loaded.model(input_ids=torch.tensor([prompt + answer[:-1]])).logits[0, len(prompt) - 1 :]
        torch.testing.assert_close(together[row, : len(answer)], alone, rtol=0, atol=1e-9)
