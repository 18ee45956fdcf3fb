"""What all answers of a model begin with: found, with chains of thought closed, and checked again.

Where every answer opens alike ("<think>", "Sure, "), the first answer token says nothing of the
behaviour. So the common opening is put into the prompt; a chain of thought is skipped by closing it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from job.data.prompts import Prompt
from job.generation.greedy import greedy_answers
from job.model.loading import LoadedModel, conversations

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

    Args:
        loaded: The model, without a prefix.
        good: Prompts without the behaviour; a few of them are answered.
        bad: Prompts with the behaviour; likewise.
        rows: Rows of a forward.
    """
    prompts = [*good[:_PROMPTS], *bad[:_PROMPTS]]
    loaded = dataclasses.replace(loaded, response_prefix=_rest_of_thought(loaded, prompts))
    for _ in range(_ROUNDS):
        # Once more after each change: what follows a closed thought may be common too.
        opening = common_opening(loaded, prompts, rows)
        if not opening:
            break
        loaded = dataclasses.replace(loaded, response_prefix=loaded.response_prefix + close_thought(opening))
    return loaded


def close_thought(opening: str) -> str:
    """Return the opening of an answer, with an empty chain of thought in place of one that it begins."""
    for begin, closed in THOUGHTS.items():
        if opening.lstrip().startswith(begin):
            return closed
    return opening


def _rest_of_thought(loaded: LoadedModel, prompts: Sequence[Prompt]) -> str:
    """Return what closes a chain of thought that the chat template itself begins, "" if it begins none."""
    texts = {text.rstrip() for text in conversations(loaded.tokenizer, prompts)}
    for begin, closed in THOUGHTS.items():
        if all(text.endswith(begin) for text in texts):
            return closed.removeprefix(begin)
    return ""


def common_opening(loaded: LoadedModel, prompts: Sequence[Prompt], rows: int) -> str:
    """Return the text of the tokens that all answers begin with, "" if they begin differently.

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
    text = str(loaded.tokenizer.decode(common, skip_special_tokens=False))
    # A space at the end would be a token of its own, where the model expects it at the start of the next.
    return text.rstrip(" ")
