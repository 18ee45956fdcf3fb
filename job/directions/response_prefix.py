"""What all answers of a model begin with: found, with chains of thought closed, and checked again.

Where every answer opens alike ("<think>", "Sure, "), the first answer token says nothing of the
behaviour. So the common opening is put into the prompt, as the tokens that the model itself has chosen. A chain of
thought is switched off in the template where that knows how, and skipped by closing it where it does not.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from job.data.prompts import Prompt
from job.generation.greedy import greedy_answers
from job.model.loading import LoadedModel
from job.model.rendering import conversations, switched

# The opening of a chain of thought and the empty one, as models of that kind write it.
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
    """Return the model such that its prompts end with what its answers to both kinds begin with.

    A template that knows how to keep the model from thinking is told so; other chains of thought are closed by hand.

    Args:
        loaded: The model, without a prefix.
        good: Prompts without the behaviour; a few of them are answered.
        bad: Prompts with the behaviour; likewise.
        rows: Rows of a forward.
    """
    prompts = [*good[:_PROMPTS], *bad[:_PROMPTS]]
    begun = _rest_of_thought(loaded, prompts)
    opening = None if begun else common_opening(loaded, prompts, rows)
    if opening is None or _is_thought(loaded, opening):
        loaded, opening = _kept_from_thinking(loaded, prompts, rows), None
        loaded = _begun(loaded, _tokens(loaded, _rest_of_thought(loaded, prompts)))
    for _ in range(_ROUNDS):
        # Once more after each change: what follows a closed thought may be common too.
        opening = common_opening(loaded, prompts, rows) if opening is None else opening
        if not opening:
            break
        closed = close_thought(text := _text(loaded, opening))
        loaded = _begun(loaded, opening if closed == text else _tokens(loaded, closed))
        opening = None
    return loaded


def _kept_from_thinking(loaded: LoadedModel, prompts: Sequence[Prompt], rows: int) -> LoadedModel:
    """Return the model with the first of its template's switches that keeps it from thinking, as it is if none does."""
    for rendering in switched(loaded.tokenizer, loaded.rendering):
        other = dataclasses.replace(loaded, rendering=rendering)
        if not _rest_of_thought(other, prompts) and not _is_thought(other, common_opening(other, prompts, rows)):
            return other
    return loaded


def _begun(loaded: LoadedModel, tokens: Sequence[int]) -> LoadedModel:
    """Return the model with further tokens at the end of its prefix."""
    text = loaded.response_prefix + _text(loaded, tokens)
    return dataclasses.replace(loaded, response_prefix=text, prefix_tokens=(*(loaded.prefix_tokens or ()), *tokens))


def _tokens(loaded: LoadedModel, text: str) -> tuple[int, ...]:
    return tuple(loaded.tokenizer(text, add_special_tokens=False)["input_ids"]) if text else ()


def _text(loaded: LoadedModel, tokens: Sequence[int]) -> str:
    return str(loaded.tokenizer.decode(list(tokens), skip_special_tokens=False))


def close_thought(opening: str) -> str:
    """Return the opening of an answer, with an empty chain of thought in place of one that it begins."""
    for begin, closed in THOUGHTS.items():
        if opening.lstrip().startswith(begin):
            return closed
    return opening


def _is_thought(loaded: LoadedModel, opening: Sequence[int]) -> bool:
    text = _text(loaded, opening)
    return close_thought(text) != text


def _rest_of_thought(loaded: LoadedModel, prompts: Sequence[Prompt]) -> str:
    """Return what closes a chain of thought that the chat template itself begins, "" if it begins none."""
    texts = {text.rstrip() for text in conversations(loaded.tokenizer, prompts, loaded.rendering)}
    for begin, closed in THOUGHTS.items():
        if all(text.endswith(begin) for text in texts):
            return closed.removeprefix(begin)
    return ""


def common_opening(loaded: LoadedModel, prompts: Sequence[Prompt], rows: int) -> tuple[int, ...]:
    """Return the tokens that all answers begin with, none if they begin differently.

    No answer consists of its opening alone: at least one token of the shortest is left to it.
    """
    answers, batching = [], loaded.architecture.batching
    for chunk in batching.chunks(loaded.tokenize(prompts), rows):
        answers += greedy_answers(loaded.model, chunk, limit=_TOKENS, end_tokens=loaded.end_tokens, batching=batching)
    common = []
    for tokens in zip(*(answer.tokens[:-1] for answer in answers), strict=False):  # as far as the shortest goes
        if len(set(tokens)) > 1:
            break
        common.append(tokens[0])
    return tuple(common)
