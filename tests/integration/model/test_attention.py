"""Attention on the loaded model: cuDNN's kernels are off, and padding never changes a result."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from job.edits.hooks import Intervention
from job.errors import ImpossibleJobError
from job.generation.forward import first_logits
from job.generation.greedy import greedy_answers
from job.model.attention import probe_prompts
from job.model.loading import load_model
from tests.helpers import loading
from tests.integration.edits.test_hooks import EDITS, basis_for, trial_scorer

PROMPTS = [[6, 9, 30, 31], [7, 40, 41, 42, 43, 44, 45], [8], [50, 51, 52, 53, 54]]
Kernel = Callable[..., tuple[Tensor, None]]


@pytest.fixture
def kernel() -> Iterator[Callable[[Kernel], None]]:
    """Return a function that registers an attention kernel for models in bfloat16, as a GPU has others than a CPU."""
    mask = ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]

    def register(attend: Kernel) -> None:
        def chosen(module: Any, query: Tensor, *others: Any, **options: Any) -> Any:
            attention = attend if query.dtype == torch.bfloat16 else sdpa_attention_forward
            return attention(module, query, *others, **options)

        ALL_ATTENTION_FUNCTIONS["sdpa"] = chosen

    yield register
    del ALL_ATTENTION_FUNCTIONS["sdpa"]
    ALL_MASK_ATTENTION_FUNCTIONS.register("sdpa", mask)


def nan_without_keys(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Return NaN for query positions whose mask is empty, as kernels do that divide by the sum of the weights."""
    output, _ = sdpa_attention_forward(module, query, key, value, mask, **options)
    if mask is not None:
        output = output.masked_fill(~mask.any(-1)[:, 0, :, None, None], torch.nan)
    return output, None


def without_mask(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Attend to padding, too."""
    if mask is not None:
        queries, keys = mask.shape[-2:]
        mask = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries).expand_as(mask)
    return sdpa_attention_forward(module, query, key, value, mask, **options)  # type: ignore[no-any-return]


def test_a_loaded_model_does_not_use_cudnns_attention(random_model_folder: Path) -> None:
    torch.backends.cuda.enable_cudnn_sdp(True)
    load_model(random_model_folder, loading("float32"), pytest.fail)
    assert not torch.backends.cuda.cudnn_sdp_enabled()


@pytest.mark.parametrize(
    ("attend", "padded", "said"),
    [
        (sdpa_attention_forward, True, []),
        (nan_without_keys, True, ["not finite in rows 0 of 2: padding attends to all tokens now"]),
        (without_mask, False, ["standard deviations from those of each prompt alone: a forward holds prompts of one"]),
    ],
)
def test_padding_does_not_change_what_a_loaded_model_says(
    random_model_folder: Path, kernel: Callable[[Kernel], None], attend: Kernel, padded: bool, said: list[str]
) -> None:
    kernel(attend)
    told: list[str] = []
    loaded = load_model(random_model_folder, loading("bfloat16"), told.append)
    assert len(told) == len(said)
    assert all(part in line for part, line in zip(said, told, strict=True))
    batching = loaded.architecture.batching
    assert (batching.padded, batching.shared, batching.cached) == (padded, padded, True)
    # Prompts of all lengths, and of one length, get the logits and answers that each gets alone.
    prompts = sorted([*PROMPTS, [9, 10, 11, 12]], key=len)
    batches = list(batching.chunks(prompts, 16))
    logits = torch.cat([first_logits(loaded.model, batch) for batch in batches])
    alone = torch.cat([first_logits(loaded.model, [prompt]) for prompt in prompts])
    assert float((logits - alone).square().mean().sqrt() / alone.std()) < 0.05
    for batch in batches:
        answers = greedy_answers(loaded.model, batch, limit=6, end_tokens=(), batching=batching)
        for answer, prompt in zip(answers, batch, strict=True):
            (expected,) = greedy_answers(loaded.model, [prompt], limit=6, end_tokens=(), batching=batching)
            ties = min((*answer.margins, *expected.margins)) < 0.05  # bfloat16 rounds other batches otherwise
            assert ties or answer.tokens == expected.tokens


def test_the_probes_stay_within_the_models_positions(random_model_folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(random_model_folder)  # 128 positions
    assert [len(prompt) for prompt in probe_prompts(model, [1, 2, 3])] == [3, 19]
    assert probe_prompts(model, [1, 2, 3])[1][:7] == [1, 2, 3, 1, 2, 3, 1]
    assert [len(prompt) for prompt in probe_prompts(model, [1] * 120)] == [120, 128]
    assert [len(prompt) for prompt in probe_prompts(model, [1] * 130)] == [130]


def test_logits_that_are_not_finite_become_no_token(random_model_folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(random_model_folder).eval()
    expected = greedy_answers(model, PROMPTS, limit=4, end_tokens=())
    # Answers end where they would read a token without a usable embedding; the last token is not read.
    spoilt = next(token for token in expected[1].tokens if not any(token in prompt for prompt in PROMPTS))
    read = [answer.tokens[:-1] for answer in expected]
    kept = [tokens[: tokens.index(spoilt) + 1] if spoilt in tokens else None for tokens in read]
    rows = ", ".join(str(index) for index, tokens in enumerate(kept) if tokens is not None)
    model.get_input_embeddings().weight.data[spoilt] = torch.nan
    with pytest.raises(ImpossibleJobError, match=f"the logits of rows {rows} of a batch of 4 are not finite"):
        greedy_answers(model, PROMPTS, limit=4, end_tokens=())
    answers = greedy_answers(model, PROMPTS, limit=4, end_tokens=(), may_fail=True)
    assert [answer.finite for answer in answers] == [tokens is None for tokens in kept]
    assert [answer.tokens for answer in answers] == [
        answer.tokens if tokens is None else tokens for answer, tokens in zip(expected, kept, strict=True)
    ]
    assert 0 < len(rows.split(", ")) < 4
    assert not first_logits(model, [[spoilt]]).isfinite().any()


def test_an_answer_that_stops_being_finite_fails_its_trial(random_model_folder: Path) -> None:
    scorer = trial_scorer(random_model_folder)
    model, batches = scorer.batches.loaded.model, scorer.batches
    with Intervention(model, batches.loaded.architecture, basis_for(model), "none") as intervention:
        answers = batches.responses(batches.bad.tokens, 3, 16, intervention.activate(EDITS[:1]))
        spoilt = next(answer.tokens[1] for answer in answers if len(answer.tokens) > 1)
        assert not any(spoilt in prompt for prompt in batches.everything)
        model.get_input_embeddings().weight.data[spoilt] = torch.nan
        rows = batches.trial_rows(intervention.activate(EDITS[:1]))
        assert torch.tensor(scorer.reference.trial_means(batches, rows, 16)).isfinite().all()
        (failed,) = scorer.scores(intervention, EDITS[:1], 16)
    assert failed.reason == "the logits are not finite"
