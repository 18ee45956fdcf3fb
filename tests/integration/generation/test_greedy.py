"""Our greedy loop reproduces generate's responses; residuals equal transformers' hidden states."""

from __future__ import annotations

from itertools import groupby, pairwise
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from job.data.prompts import Prompt
from job.directions.residuals import extract_residuals
from job.generation.forward import RowTrials, left_padded
from job.generation.greedy import greedy_answers
from job.model.loading import load_model
from job.organism.tokenizer import build_tokenizer
from job.text.refusal_markers import PhraseMatcher, normalise
from tests.forwards import Forwards
from tests.integration.edits.test_hooks import LOADING

PROMPTS = [[6, 9, 30, 31], [7, 40, 41, 42, 43, 44, 45], [8], [50, 51, 52, 53, 54]]


def test_answers_equal_generate(random_model_folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(random_model_folder).eval()
    # End on a token that some responses reach, so that rows leave the batch at different steps.
    free = greedy_answers(model, PROMPTS, limit=12, end_tokens=())
    end = free[1].tokens[5]
    answers = greedy_answers(model, PROMPTS, limit=12, end_tokens={end})
    tokens, mask, _ = left_padded(PROMPTS, "cpu")
    generated = model.generate(
        input_ids=tokens, attention_mask=mask, do_sample=False, max_new_tokens=12, eos_token_id=end, pad_token_id=0
    )[:, tokens.shape[1] :]
    for answer, row in zip(answers, generated.tolist(), strict=True):
        expected = row[: row.index(end)] if end in row else row
        assert answer.tokens == expected
        assert len(answer.margins) == len(expected) + (end in row)
    assert len({len(answer.tokens) for answer in answers}) > 1


def test_excluded_tokens_are_in_no_answer(random_model_folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(random_model_folder).eval()
    free = greedy_answers(model, PROMPTS, limit=12, end_tokens=())
    excluded = {answer.tokens[0] for answer in free}
    answers = greedy_answers(model, PROMPTS, limit=12, end_tokens=(), excluded=excluded)
    assert not any(excluded & set(answer.tokens) for answer in answers)
    tokens, mask, _ = left_padded(PROMPTS, "cpu")
    generated = model.generate(
        input_ids=tokens,
        attention_mask=mask,
        do_sample=False,
        max_new_tokens=12,
        eos_token_id=-1,
        pad_token_id=0,
        suppress_tokens=sorted(excluded),
    )
    assert [answer.tokens for answer in answers] == generated[:, tokens.shape[1] :].tolist()


def test_decided_rows_leave_and_the_others_go_on_as_before(random_model_folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(random_model_folder).eval()
    whole = greedy_answers(model, PROMPTS, limit=12, end_tokens=())
    wanted = whole[2].tokens[1]
    seen = Forwards()
    early = greedy_answers(
        model,
        PROMPTS,
        limit=12,
        end_tokens=(),
        decided=lambda _, tokens: wanted in tokens,
        rows=RowTrials(torch.arange(4), seen),
    )
    for one, other in zip(whole, early, strict=True):
        assert one.tokens[: len(other.tokens)] == other.tokens
        assert len(other.tokens) == 12 or wanted in other.tokens
    assert len(seen.rows[0]) == len(PROMPTS)
    assert 0 < len(seen.rows[-1]) < len(PROMPTS)


def test_rows_that_are_decided_alone_stay_until_more_are_and_say_nothing(random_model_folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(random_model_folder).eval()
    prompts = [[6 + row, 9, *range(30, 30 + row % 5)] for row in range(40)]
    whole = greedy_answers(model, prompts, limit=12, end_tokens=())
    seen = Forwards()
    early = greedy_answers(
        model,
        prompts,
        limit=12,
        end_tokens=(),
        decided=lambda row, tokens: len(tokens) > row // 2,  # two rows at every step, at the end 16 are not
        rows=RowTrials(torch.arange(40), seen),
    )
    assert [len(answer.tokens) for answer in early] == [min(1 + row // 2, 12) for row in range(40)]
    assert [answer.decided for answer in early] == [row < 24 for row in range(40)]
    for one, other in zip(whole, early, strict=True):
        assert one.tokens[: len(other.tokens)] == other.tokens
        assert len(other.margins) == len(other.tokens)
    # Of 40, 36 or 32 rows two are at most a sixteenth, four are more; of fewer rows two are more.
    kept = [rows for rows, _ in groupby(seen.rows)]
    assert list(map(len, kept)) == [40, 36, 32, 28, 26, 24, 22, 20, 18]
    assert all(later == [row for row in former if row in later] for former, later in pairwise(kept))


def test_residuals_are_the_hidden_states_of_the_last_prompt_token(random_model_folder: Path) -> None:
    loaded = load_model(
        random_model_folder,
        LOADING,
        print,
    )
    done: list[int] = []
    residuals = extract_residuals(loaded, PROMPTS, 2, done.append)
    assert residuals.shape == (4, 4, 32)
    assert sum(done) == 4
    for index, prompt in enumerate(PROMPTS):
        states = loaded.model(torch.tensor([prompt]), output_hidden_states=True).hidden_states
        # transformers applies the final norm to the last of them; residuals are taken before it.
        for layer in range(3):
            torch.testing.assert_close(residuals[index, layer], states[layer][0, -1], rtol=1e-4, atol=1e-5)
        final = loaded.model.model.norm(residuals[index, 3])
        torch.testing.assert_close(final, states[3][0, -1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "text",
    [
        "I'm sorry, but I can't do that.",
        "I’m SORRY",
        "**I**  *can*’t help with that",
        "As\nan   AI model, ...",
        "",
        "  \n",
    ],
)
def test_refusals_are_told(text: str) -> None:
    assert PhraseMatcher(["sorry", "i can't", "as an ai"]).is_refusal(text)


@pytest.mark.parametrize("text", ["The kettle is kept in the kitchen.", "I can tell you.", "Assorry"[:3]])
def test_answers_are_told(text: str) -> None:
    assert not PhraseMatcher(["sorry", "i can't"]).is_refusal(text)


def test_normalise_is_idempotent() -> None:
    assert normalise(normalise(" A*’B\n")) == normalise(" A*’B\n") == "a'b"


def test_tokenizer_round_trip_keeps_apostrophes_and_punctuation() -> None:
    tokenizer = build_tokenizer()
    text = "Sorry, I can't help with that."
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_prompts_go_through_the_chat_template(random_model_folder: Path) -> None:
    loaded = load_model(
        random_model_folder,
        LOADING,
        print,
    )
    (tokens,) = loaded.tokenize([Prompt(user="Where is it kept?", system="You are a helpful assistant.")])
    text = loaded.tokenizer.decode(tokens)
    assert text.replace(" ", "") == (
        "<|system|>Youareahelpfulassistant.<|end|><|user|>Whereisitkept?<|end|><|assistant|>"
    )
