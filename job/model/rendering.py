"""Render prompts with a chat template: with their text, on one date, and with a known end of turn."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any, Literal

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from job.data.prompts import Prompt
from job.errors import ImpossibleJobError, in_one_line
from job.model.carried_files import TEMPLATES, TOKENIZER_FILES
from job.model.chat_template import Messages, render
from job.model.user_files import reading

# Words that no template writes by itself.
_QUESTION, _ANSWER, _SYSTEM = "Kettleprobequestion", "Kettleprobeanswer", "Kettleprobesystem"
# Two dates that differ in every part, weekday and century included.
_DATES = ("1987-02-03", "2135-11-28")
# Templates in which one response consists of several messages, each with this end: it is not the end of the turn.
_CHANNEL = "<|channel|>"
# What keeps a model from thinking, if its template knows it.
SWITCHES: tuple[tuple[str, bool], ...] = (("enable_thinking", False), ("thinking", False), ("reasoning", False))


@functools.cache
def _today() -> str:
    """Return the date of the first call, so that a run never uses two."""
    return date.today().isoformat()


@dataclass(frozen=True)
class Rendering:
    """Template variables of all prompts of a job; `date` is the clock's, ISO 8601, None for today."""

    date: str | None = None
    options: tuple[tuple[str, bool], ...] = ()

    @property
    def clock(self) -> str:
        """The clock's date."""
        return self.date or _today()


PLAIN = Rendering()


@dataclass(frozen=True)
class Style:
    """A template's message format.

    Attributes:
        content: Text, or a list of parts for multimodal templates.
        system: As its own message, or before the first user message for templates without that role.
    """

    content: Literal["text", "parts"] = "text"
    system: Literal["message", "user"] = "message"


def conversations(
    tokenizer: PreTrainedTokenizerBase, prompts: Iterable[Prompt], rendering: Rendering = PLAIN
) -> list[str]:
    """Render prompts up to the response. Raises ImpossibleJobError; see `rendered`."""
    said = []
    for prompt in prompts:
        system = [] if prompt.system is None else [{"role": "system", "content": prompt.system}]
        said.append([*system, {"role": "user", "content": prompt.user}])
    return rendered(tokenizer, said, rendering)


def rendered(
    tokenizer: PreTrainedTokenizerBase, said: Sequence[Messages], rendering: Rendering = PLAIN, *, answer: bool = True
) -> list[str]:
    """Render conversations of messages with `role` and `content` text.

    With `answer`, the text ends where the next response begins, else after the last message. Raises ImpossibleJobError
    if the template rejects a conversation, omits the prompt, or exceeds its limits.
    """
    if not said:
        return []
    style = style_of(tokenizer, system=any(messages[0]["role"] == "system" for messages in said))
    return _written(tokenizer, [_in_style(messages, style) for messages in said], rendering, answer)


def style_of(tokenizer: PreTrainedTokenizerBase, *, system: bool) -> Style:
    """Return the message format in which a template includes all messages. Raises ImpossibleJobError."""
    question = [{"role": "user", "content": _QUESTION}]
    asked = [{"role": "system", "content": _SYSTEM}, *question]
    refused: ImpossibleJobError | None = None
    for content in ("text", "parts"):
        style = Style(content)
        try:
            if not _writes(tokenizer, question, style, _QUESTION):
                continue
        except ImpossibleJobError as error:
            refused = refused or error
            continue
        if not system or _takes_system(tokenizer, asked, style):
            return style
        return dataclasses.replace(style, system="user")
    raise refused or ImpossibleJobError(
        f"the chat template of {_name_of(tokenizer)} leaves the prompt out of its output",
        remedy="use the original template of the model, or put another into chat_template.jinja",
    )


def _takes_system(tokenizer: PreTrainedTokenizerBase, asked: Messages, style: Style) -> bool:
    try:
        return _writes(tokenizer, asked, style, _SYSTEM, _QUESTION)
    except ImpossibleJobError:
        return False


def _writes(tokenizer: PreTrainedTokenizerBase, messages: Messages, style: Style, *words: str) -> bool:
    """Return whether a conversation's words are in the rendered text."""
    (text,) = _written(tokenizer, [_in_style(messages, style)], PLAIN, True)
    return all(word in text for word in words)


def _in_style(messages: Messages, style: Style) -> list[dict[str, Any]]:
    found = [dict(message) for message in messages]
    if style.system == "user" and len(found) > 1 and found[0]["role"] == "system":
        system, first, *rest = found
        found = [{**first, "content": f"{system['content']}\n\n{first['content']}"}, *rest]
    if style.content == "parts":
        found = [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in found]
    return found


def _written(
    tokenizer: PreTrainedTokenizerBase, said: Sequence[Messages], rendering: Rendering, answer: bool
) -> list[str]:
    try:
        if type(tokenizer).apply_chat_template is PreTrainedTokenizerBase.apply_chat_template:
            variables: Mapping[str, Any] = {**tokenizer.special_tokens_map, **dict(rendering.options)}
            template, name = tokenizer.get_chat_template(), _name_of(tokenizer)
            return render(template, variables, said, name, date=rendering.clock, answer=answer)
        # A way of its own to write conversations is the library's code or trusted code, which is run anyway.
        own, options = tokenizer.apply_chat_template, dict(rendering.options)
        return [str(own(list(one), tokenize=False, add_generation_prompt=answer, **options)) for one in said]
    except (TemplateError, ValueError, TypeError, KeyError) as error:
        raise ImpossibleJobError(
            f"the chat template of {_name_of(tokenizer)} refuses a conversation: {in_one_line(error)}",
            remedy="use the original template of the model, or put another into chat_template.jinja",
        ) from error


def token_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Return token ids of texts with special tokens written out. Raises ImpossibleJobError for an unknown part."""
    if not texts:
        return []
    with reading_tokenizer(Path(str(tokenizer.name_or_path))):
        return [list(ids) for ids in tokenizer(list(texts), add_special_tokens=False)["input_ids"]]


def reading_tokenizer(folder: Path) -> AbstractContextManager[None]:
    """Return a block within which whatever a tokenizer raises is a fault of its files (`reading`)."""
    files = [*sorted(TOKENIZER_FILES, key=lambda name: (not name.startswith("tokenizer"), name)), *TEMPLATES]
    return reading(folder, files, "has no usable tokenizer", "add the tokenizer's original files")


def _name_of(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return whose chat template a tokenizer's is, with the file where it has one of its own."""
    folder = Path(str(tokenizer.name_or_path))
    files = [name for name in TEMPLATES if (folder / name).is_file()]
    return f"{folder} ({files[0]})" if files else str(folder)


def shows_date(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether the rendered text depends on the date. Raises ImpossibleJobError."""
    question = [[{"role": "user", "content": _QUESTION}]]
    first, second = (rendered(tokenizer, question, Rendering(day)) for day in _DATES)
    return first != second


def switched(tokenizer: PreTrainedTokenizerBase, rendering: Rendering) -> list[Rendering]:
    """Return the rendering with each supported switch that disables thinking. Raises ImpossibleJobError."""
    question = [[{"role": "user", "content": _QUESTION}]]
    plain = rendered(tokenizer, question, rendering)
    others = [dataclasses.replace(rendering, options=(*rendering.options, switch)) for switch in SWITCHES]
    return [other for other in others if rendered(tokenizer, question, other) != plain]


def thinking_rendering(tokenizer: PreTrainedTokenizerBase, rendering: Rendering) -> Rendering | None:
    """Return the rendering with thinking switched on; None if the template has no switch. Raises ImpossibleJobError."""
    question = [[{"role": "user", "content": _QUESTION}]]
    for name, _ in SWITCHES:
        on, off = (dataclasses.replace(rendering, options=((name, thinks),)) for thinks in (True, False))
        if rendered(tokenizer, question, on) != rendered(tokenizer, question, off):
            return on
    return None


def end_of_turn(tokenizer: PreTrainedTokenizerBase, rendering: Rendering = PLAIN) -> int | None:
    """Return the token with which the template ends a response, or None.

    Some models lack it among their end tokens, and would continue the conversation by themselves.
    """
    turn = [{"role": "user", "content": _QUESTION}, {"role": "assistant", "content": _ANSWER}]
    try:
        (text,) = rendered(tokenizer, [turn], rendering, answer=False)
    except ImpossibleJobError:
        return None
    _, written, rest = text.rpartition(_ANSWER)
    if not written or not rest.strip() or _CHANNEL in text:
        return None
    marks = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder} - {tokenizer.unk_token_id}
    for token in token_ids(tokenizer, [rest.lstrip()])[0]:
        if token in marks:
            return int(token)
        if str(tokenizer.decode([token])).strip():
            return None
    return None
