"""Our decoding reproduces transformers' generate for every kind of cache, with and without a shared prefix."""

from __future__ import annotations

import pytest
import torch
from transformers.cache_utils import DynamicLayer

from job.generation.answer import Answer
from job.generation.forward import RowTrials, first_logits, last_logits, left_padded, shared_prefix
from job.generation.greedy import greedy_answers
from job.generation.kv_cache import GrowableKVLayer, common_prefix, rows_can_be_picked, takes_cache, writable_slots
from job.records import READ_TOKENS
from tests.forwards import Forwards
from tests.zoo import FAMILIES, tiny_model

BEGINNING = [5, 9, 11, 13, 17, 19]
# Shorter and longer than a window of 8, with more padding than the prefix is long.
PROMPTS = [
    BEGINNING + torch.randint(3, 97, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (3, 9, 1, 14)
]
# Whether transformers' caches of these families hold one slot per token, and nothing else.
SHARING = {"llama", "qwen3", "gemma2", "llama4", "mixtral", "gpt-neox"}
NOT_OURS = {"mamba", "minimax"}


def read_in_parts_of(tokens: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read prompts with at most this number of tokens per forward; None: no limit."""
    if tokens is None:
        monkeypatch.delitem(READ_TOKENS, "cpu")
    else:
        monkeypatch.setitem(READ_TOKENS, "cpu", tokens)


def same(one: list[Answer], other: list[Answer]) -> bool:
    return [answer.tokens for answer in one] == [answer.tokens for answer in other]


# Messages of reference kernels and of some configurations.
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tokens", [None, 24, 1], ids=["read together", "in parts", "one by one"])
def test_answers_equal_generate_in_every_family(
    family: str, tokens: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_in_parts_of(tokens, monkeypatch)
    model = tiny_model(family)
    assert takes_cache(model) == (family not in NOT_OURS)
    free = greedy_answers(model, PROMPTS, limit=10, end_tokens=())
    assert all(len(answer.tokens) == 10 for answer in free)
    # End on a token that some responses reach, so that rows leave the batch at different steps.
    end = free[1].tokens[4]
    answers = greedy_answers(model, PROMPTS, limit=10, end_tokens={end}, openings=[7] * 4)
    tokens, mask, _ = left_padded(PROMPTS, "cpu")
    generated = model.generate(
        input_ids=tokens, attention_mask=mask, do_sample=False, max_new_tokens=10, eos_token_id=end, pad_token_id=0
    )[:, tokens.shape[1] :]
    for answer, row in zip(answers, generated.tolist(), strict=True):
        expected = row[: row.index(end)] if end in row else row
        assert answer.tokens == expected
        assert len(answer.margins) == len(expected) + (end in row)
    odds = first_logits(model, PROMPTS).softmax(-1)[:, 7]
    torch.testing.assert_close(
        torch.tensor([a.opening for a in answers]), odds.log() - (1 - odds).log(), rtol=1e-3, atol=1e-3
    )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", sorted(SHARING))
@pytest.mark.parametrize("tokens", [None, 24], ids=["read together", "in parts"])
def test_a_prefix_computed_once_changes_nothing(
    family: str, tokens: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_in_parts_of(tokens, monkeypatch)
    model = tiny_model(family)
    prefix = common_prefix(PROMPTS)
    assert prefix == BEGINNING
    assert writable_slots(model) >= len(prefix)
    # Two trials, which do not differ here; tests of the intervention have trials that do.
    shared = RowTrials(torch.tensor([0, 1, 0, 1]), prefix=shared_prefix(model, prefix, 2, None))
    torch.testing.assert_close(first_logits(model, PROMPTS, shared), first_logits(model, PROMPTS), rtol=0, atol=1e-5)
    several, alone = last_logits(model, PROMPTS, 1, shared), last_logits(model, [PROMPTS[2]], 1)
    torch.testing.assert_close(several[2:3], alone, rtol=0, atol=1e-5)
    for end_tokens in ((), {greedy_answers(model, PROMPTS, limit=10, end_tokens=())[1].tokens[4]}):
        whole = greedy_answers(model, PROMPTS, limit=10, end_tokens=end_tokens)
        assert same(greedy_answers(model, PROMPTS, limit=10, end_tokens=end_tokens, rows=shared), whole)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", sorted(set(FAMILIES) - SHARING))
def test_caches_with_more_than_a_slot_a_token_share_no_prefix(family: str) -> None:
    assert writable_slots(tiny_model(family)) == 0


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", ["llama", "gemma2", "falcon-h1", "mamba"])
@pytest.mark.parametrize("tokens", [None, 24], ids=["read together", "in parts"])
def test_rows_that_leave_early_change_no_other(
    family: str, tokens: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_in_parts_of(tokens, monkeypatch)
    model = tiny_model(family)
    whole = greedy_answers(model, PROMPTS, limit=10, end_tokens=())
    lengths = [2, 10, 5, 1]
    early = greedy_answers(model, PROMPTS, limit=10, end_tokens=(), decided=lambda i, tokens: len(tokens) == lengths[i])
    assert [answer.tokens for answer in early] == [
        answer.tokens[:length] for answer, length in zip(whole, lengths, strict=True)
    ]


def test_a_cache_that_cannot_be_picked_from_is_decoded_whole() -> None:
    from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING, DynamicLayer

    class Unknown(DynamicLayer):
        """A layer of a kind that may hold more than its rows' keys and values."""

        _layer_type = "of an unknown kind"

    try:
        model = tiny_model("llama")
        expected = greedy_answers(model, PROMPTS, limit=6, end_tokens=())
        model.config.layer_types = ["of an unknown kind"] * model.config.num_hidden_layers
        assert not rows_can_be_picked(model)
        assert writable_slots(model) == 0
        seen = Forwards()
        answers = greedy_answers(
            model,
            PROMPTS,
            limit=6,
            end_tokens=(),
            decided=lambda i, tokens: i < 2 and len(tokens) == 3,
            rows=RowTrials(torch.arange(4), seen),
        )
        assert [a.tokens for a in answers] == [a.tokens[: 3 if i < 2 else 6] for i, a in enumerate(expected)]
        assert seen.rows == [[0, 1, 2, 3]] * 6
    finally:
        DYNAMIC_LAYER_TYPE_MAPPING.pop("of an unknown kind", None)


def test_every_forward_has_the_trials_of_its_own_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    # Two parts of two prompts, by length: one row of the first and both rows of the second continue.
    read_in_parts_of(40, monkeypatch)
    seen = Forwards()
    greedy_answers(
        tiny_model("llama"),
        PROMPTS,
        limit=4,
        end_tokens=(),
        decided=lambda i, tokens: len(tokens) == (1 if i == 0 else 3),
        rows=RowTrials(torch.arange(4), seen),
    )
    assert seen.rows == [[2, 0], [1, 3], [2, 1, 3], [2, 1, 3]]


def test_a_layer_with_room_holds_what_one_without_does() -> None:
    generator = torch.Generator().manual_seed(0)

    def some(tokens: int, rows: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = (torch.randn(rows, tokens, 2, width, generator=generator) for width in (4, 6))
        return keys.transpose(1, 2), values.transpose(1, 2).contiguous()

    roomy, plain = GrowableKVLayer(60), DynamicLayer()
    behind = torch.randn(3, 2, 9, 4, generator=generator)  # spare capacity follows the first keys
    first = behind[:, :, :5], some(5)[1]
    expected = behind.clone()
    places = []
    for tokens, keep in ((5, None), (1, None), (1, None), (3, None), (1, [0, 2]), (1, None), (40, [1]), (1, None)):
        given = first if tokens == 5 else some(tokens, len(plain.keys))
        found, wanted = roomy.update(*given), plain.update(*given)
        assert all(map(torch.equal, found, wanted))
        places.append(found[0].data_ptr())
        if keep is not None:
            for layer in (roomy, plain):
                layer.reorder_cache(torch.tensor(keep))
    assert torch.equal(behind, expected)
    # Capacity is allocated with the first decoded token, for the following ones too; selected rows keep theirs.
    assert places[0] != places[1] == places[2] == places[3] == places[4] != places[5]
    picked = roomy.keys.data_ptr()
    assert roomy.keys.shape == plain.keys.shape
    more = some(1, 1)
    assert all(map(torch.equal, roomy.update(*more), plain.update(*more)))
    assert roomy.keys.data_ptr() == picked


def test_a_layer_that_begins_with_room_grows_into_it() -> None:
    behind = torch.zeros(3, 2, 7, 4)
    behind[:, :, :5] = 1.0
    layer = GrowableKVLayer(60)
    layer.begin(behind[:, :, :5], behind[:, :, :5].clone())
    assert layer.get_seq_length() == 5
    keys, values = layer.update(2 * torch.ones(3, 2, 2, 4), 3 * torch.ones(3, 2, 2, 4))
    assert keys.data_ptr() == behind.data_ptr()
    assert torch.equal(behind[:, :, 5:], 2 * torch.ones(3, 2, 2, 4))
    assert values[0, 0, :, 0].tolist() == [1.0] * 5 + [3.0] * 2


def test_common_prefix_leaves_a_token_of_every_prompt() -> None:
    assert common_prefix([[1, 2, 3], [1, 2]]) == [1]
    assert common_prefix([[1, 2], [1, 2]]) == [1]
    assert common_prefix([[1, 2], [3]]) == []
    assert common_prefix([]) == []
