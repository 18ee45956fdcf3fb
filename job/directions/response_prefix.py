"""Response prefix: find the common opening of a model's responses, closing chains of thought.

If every response opens alike ("<think>", "Sure, "), the first token says nothing about the behaviour. The prompt is
therefore extended with that opening, as the model's own tokens. A chain of thought is disabled through the chat
template where it has a switch, else closed at once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from job.data.prompts import Prompt
from job.generation.answer import Answer
from job.generation.greedy import greedy_answers
from job.generation.kv_cache import common_prefix
from job.model.device_faults import halving
from job.model.loading import LoadedModel
from job.model.rendering import conversations, switched, token_ids

# Opening of a chain of thought, and the empty one.
THOUGHTS = {
    "<think>": "<think></think>",
    "<thought>": "<thought></thought>",
    "[THINK]": "[THINK][/THINK]",
    "<|channel|>analysis<|message|>": (
        "<|channel|>analysis<|message|><|end|><|start|>assistant<|channel|>final<|message|>"
    ),
}
_PROMPTS, _TOKENS, _ROUNDS = 25, 16, 4


def with_response_prefix(loaded: LoadedModel, good: Sequence[Prompt], bad: Sequence[Prompt], rows: int) -> LoadedModel:
    """Return the model with prompts extended by its responses' common opening, with thoughts disabled or closed."""
    prompts = [*good[:_PROMPTS], *bad[:_PROMPTS]]
    closing = _closing_of_thought(loaded, prompts)
    opening = None if closing else common_opening(loaded, prompts, rows)
    if opening is None or _is_thought(loaded, opening):
        loaded, opening = _with_thinking_disabled(loaded, prompts, rows), None
        loaded = _with_longer_prefix(loaded, _tokens(loaded, _closing_of_thought(loaded, prompts)))
    for _ in range(_ROUNDS):
        # Repeated after each change: the text after a closed thought may be common too.
        opening = common_opening(loaded, prompts, rows) if opening is None else opening
        if not opening:
            break
        closed = close_thought(text := _text(loaded, opening))
        loaded = _with_longer_prefix(loaded, opening if closed == text else _tokens(loaded, closed))
        opening = None
    return loaded


def _with_thinking_disabled(loaded: LoadedModel, prompts: Sequence[Prompt], rows: int) -> LoadedModel:
    """Return the model with the first template switch that disables thinking, unchanged if none does."""
    for rendering in switched(loaded.tokenizer, loaded.rendering):
        other = dataclasses.replace(loaded, rendering=rendering)
        if not _closing_of_thought(other, prompts) and not _is_thought(other, common_opening(other, prompts, rows)):
            return other
    return loaded


def _with_longer_prefix(loaded: LoadedModel, tokens: Sequence[int]) -> LoadedModel:
    text = loaded.response_prefix + _text(loaded, tokens)
    return dataclasses.replace(loaded, response_prefix=text, prefix_tokens=(*(loaded.prefix_tokens or ()), *tokens))


def _tokens(loaded: LoadedModel, text: str) -> tuple[int, ...]:
    return tuple(token_ids(loaded.tokenizer, [text])[0]) if text else ()


def _text(loaded: LoadedModel, tokens: Sequence[int]) -> str:
    return str(loaded.tokenizer.decode(list(tokens), skip_special_tokens=False))


def close_thought(opening: str) -> str:
    """Return a response's opening with its chain of thought replaced by an empty one."""
    for begin, closed in THOUGHTS.items():
        if opening.lstrip().startswith(begin):
            return closed
    return opening


def _is_thought(loaded: LoadedModel, opening: Sequence[int]) -> bool:
    text = _text(loaded, opening)
    return close_thought(text) != text


def _closing_of_thought(loaded: LoadedModel, prompts: Sequence[Prompt]) -> str:
    """Return the text that closes a chain of thought begun by the chat template; "" if it begins none."""
    texts = {text.rstrip() for text in conversations(loaded.tokenizer, prompts, loaded.rendering)}
    for begin, closed in THOUGHTS.items():
        if all(text.endswith(begin) for text in texts):
            return closed.removeprefix(begin)
    return ""


def common_opening(loaded: LoadedModel, prompts: Sequence[Prompt], rows: int) -> tuple[int, ...]:
    """Return the tokens that all responses begin with, leaving at least one token to each."""
    model, end, batching = loaded.model, loaded.end_tokens, loaded.architecture.batching
    tokenized = loaded.tokenize(prompts)

    def generate(rows: int) -> list[Answer]:
        batches = batching.chunks(tokenized, rows)
        by_batch = (greedy_answers(model, batch, limit=_TOKENS, end_tokens=end, batching=batching) for batch in batches)
        return [answer for answers in by_batch for answer in answers]

    answers, _ = halving(rows, generate, lambda _: None)  # the rows are reported where many prompts are computed
    return tuple(common_prefix([answer.tokens for answer in answers]))
