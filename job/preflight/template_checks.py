"""Render and tokenize every prompt, and compare it with the model's limits."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from job.data.prompts import Prompt, PromptSets
from job.errors import ImpossibleJobError, JobError
from job.preflight.checks import Check
from job.text.decoding import decoded

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

    from job.model.rendering import Rendering

_SETS = ("good", "bad", "good_search", "bad_search", "good_report", "bad_report", "helpfulness", "unhelpfulness")
# A table of learned positions may have a few rows more than the configuration says, as OPT's has.
_SPARE_POSITIONS = 8
# Prompts that are named, of each kind.
_PLACES = 3


@dataclass(frozen=True)
class WrittenPrompt:
    """A rendered prompt."""

    place: str
    prompt: Prompt
    text: str
    tokens: Sequence[int]


def template_checks(
    folder: Path,
    trusted: bool,
    tokenizer: PreTrainedTokenizerBase,
    prompts: PromptSets | None,
    rendering: Rendering,
    answer_tokens: int,
) -> list[Check]:
    """Render all prompts within the template's limits, and compare them with the model's. Raises ImpossibleJobError."""
    from job.model.chat_template import MEMORY_BYTES, SECONDS
    from job.model.loading import read_config

    begin, config = time.monotonic(), read_config(folder, trusted)
    written = _written(tokenizer, prompts, rendering)
    seconds, longest = time.monotonic() - begin, max(written, key=lambda one: len(one.tokens))
    _require_known_tokens(written, tokenizer, config)
    warnings = [
        *_same_tokens(written),
        *_too_long(longest, config, answer_tokens),
        *_changed(written),
        *_special_tokens(written, tokenizer),
        *_beginnings(written, tokenizer),
        *_endings(folder, tokenizer, config, rendering),
    ]
    characters = max(len(one.text) for one in written)
    size = f"of at most {characters} characters and {len(longest.tokens)} tokens"
    said = [f"{len(written)} conversations in {seconds:.1f} s, {size}", *_style(tokenizer, written, rendering)]
    return [
        Check(
            name="model.template",
            status="warn" if warnings else "ok",
            measured="; ".join([*said, *(what for what, _ in warnings)]),
            needed=f"{SECONDS} s of processor time and {MEMORY_BYTES >> 20} MiB, more for many prompts; whole prompts",
            remedy="; ".join(dict.fromkeys(remedy for _, remedy in warnings)),
        )
    ]


def _written(
    tokenizer: PreTrainedTokenizerBase, prompts: PromptSets | None, rendering: Rendering
) -> list[WrittenPrompt]:
    from job.model.loading import GREETING
    from job.model.rendering import conversations, token_ids

    places = {GREETING: "the greeting"}
    for name in _SETS if prompts is not None else ():
        for number, prompt in enumerate(getattr(prompts, name)):
            places.setdefault(prompt, f"prompt {number} of {name}")
    for number, prompt in enumerate(prompts.capability if prompts is not None else ()):
        places.setdefault(prompt, f"prompt {number} of capability")
    texts = conversations(tokenizer, places, rendering)
    ids = token_ids(tokenizer, texts)
    return [
        WrittenPrompt(place, prompt, text, tokens)
        for (prompt, place), text, tokens in zip(places.items(), texts, ids, strict=True)
    ]


def _same_tokens(written: Sequence[WrittenPrompt]) -> Warnings:
    """Return a warning if good and bad prompts consist of the same tokens, as where their words are unknown."""
    good, bad = (
        {frozenset(one.tokens) for one in written if one.place.endswith(f" of {kind}")} for kind in ("good", "bad")
    )
    if not good or good != bad:
        return []
    what = "good and bad prompts consist of the same tokens: tokenizer.json lacks their words"
    return [(what, "use the model's original tokenizer, or no direction will be found")]


def _require_known_tokens(
    written: Sequence[WrittenPrompt], tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig
) -> None:
    """Refuse tokens for which the model has no embedding. Raises ImpossibleJobError."""
    size = config.get_text_config().vocab_size
    for one in written:
        if not one.tokens:
            raise ImpossibleJobError(
                f"{one.place} becomes zero tokens in the chat template", remedy="remove it from the prompts"
            )
        if (most := max(one.tokens)) >= size:
            raise ImpossibleJobError(
                f"{one.place} has token {most} ({tokenizer.convert_ids_to_tokens(most)!r}), but the model's embedding "
                f"has {size} rows",
                remedy="use the original tokenizer and template of the model",
            )


Warnings = list[tuple[str, str]]


def _too_long(longest: WrittenPrompt, config: PretrainedConfig, answer_tokens: int) -> Warnings:
    """Return a warning above the model's context length. Raises ImpossibleJobError for learned positions."""
    most = getattr(config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(most, int) or len(longest.tokens) + answer_tokens <= most:
        return []
    what = (
        f"{longest.place} has {len(longest.tokens)} tokens and its response up to {answer_tokens}, "
        f"but the model has {most} positions"
    )
    remedy = "remove it, or cut it with max_characters"
    if _learns_positions(config, most):
        raise ImpossibleJobError(what, remedy=remedy)
    return [(what, remedy)]


def _learns_positions(config: PretrainedConfig, most: int) -> bool:
    from torch import nn

    from job.architectures.tiny_model import empty_model

    try:
        model = empty_model(config)
    except JobError:
        return False  # the architecture has a check of its own
    words = model.get_input_embeddings()
    tables = (module for module in model.modules() if isinstance(module, nn.Embedding) and module is not words)
    return any(most <= table.num_embeddings <= most + _SPARE_POSITIONS for table in tables)


def _changed(written: Sequence[WrittenPrompt]) -> Warnings:
    changed = [one.place for one in written if "".join(one.prompt.user.split()) not in "".join(one.text.split())]
    return (
        [(f"{_named_prompts(changed)} changed by the template", "check how the template writes them")]
        if changed
        else []
    )


def _special_tokens(written: Sequence[WrittenPrompt], tokenizer: PreTrainedTokenizerBase) -> Warnings:
    marks = [mark for mark in tokenizer.all_special_tokens if mark.strip()]
    marks += [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    spelling = {one.place: [mark for mark in marks if mark in one.prompt.user] for one in written}
    places = [place for place, found in spelling.items() if found]
    if not places:
        return []
    what = f"{_named_prompts(places)} with the special token {spelling[places[0]][0]!r} in the text"
    return [(what, "remove such prompts: the model reads the token as the start or end of a turn")]


def _beginnings(written: Sequence[WrittenPrompt], tokenizer: PreTrainedTokenizerBase) -> Warnings:
    """Return a warning for texts with two beginning tokens, or without the tokenizer's."""
    bos = tokenizer.bos_token_id
    if bos is None:
        return []
    if any(list(one.tokens[:2]) == [bos, bos] for one in written):
        return [(f"texts begin with {tokenizer.bos_token!r} twice", "use the original template of the model")]
    own = tokenizer("a")["input_ids"]
    if own[:1] == [bos] and all(one.tokens[0] != bos for one in written):
        what = f"the template does not begin with {tokenizer.bos_token!r}, as the tokenizer does"
        return [(what, "use the original template of the model")]
    return []


def _endings(
    folder: Path, tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig, rendering: Rendering
) -> Warnings:
    from job.model.rendering import end_of_turn

    known = (config.get_text_config().eos_token_id, tokenizer.eos_token_id, _generation_end(folder))
    if any(end is not None for end in known) or end_of_turn(tokenizer, rendering) is not None:
        return []
    return [
        (
            "no token ends a response",
            "set eos_token in tokenizer_config.json; without it every response has the maximum length",
        )
    ]


def _generation_end(folder: Path) -> object:
    try:
        return json.loads(decoded((folder / "generation_config.json").read_bytes())).get("eos_token_id")
    except (OSError, ValueError, AttributeError, RecursionError):
        return None


def _style(tokenizer: PreTrainedTokenizerBase, written: Sequence[WrittenPrompt], rendering: Rendering) -> list[str]:
    from job.model.rendering import shows_date, style_of

    style = style_of(tokenizer, system=any(one.prompt.system is not None for one in written))
    said = ["messages as lists of parts"] if style.content == "parts" else []
    said += ["system prompts in the user's turn, since the template has no role for them"] * (style.system == "user")
    said += [f"dated {rendering.clock}"] if shows_date(tokenizer) else []
    return said


def _named_prompts(places: Sequence[str]) -> str:
    named = ", ".join(places[:_PLACES]) + (", …" if len(places) > _PLACES else "")
    return f"{len(places)} {'prompt' if len(places) == 1 else 'prompts'} ({named})"
