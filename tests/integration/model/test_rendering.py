"""Rendering prompts: text included, one fixed date, and the last token of a turn."""

from __future__ import annotations

from datetime import date

import pytest
from transformers import PreTrainedTokenizerBase

from job.data.prompts import Prompt
from job.errors import ImpossibleJobError
from job.model import rendering
from job.model.rendering import (
    Rendering,
    Style,
    conversations,
    end_of_turn,
    rendered,
    shows_date,
    style_of,
    switched,
)
from job.organism.tokenizer import build_tokenizer

TURNS = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
PARTS = "{% for m in messages %}<|{{ m.role }}|>{% for p in m.content %}{{ p.text }}{% endfor %}{% endfor %}"
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('none') }}{% endif %}" + TURNS
DEAF = "{% for m in messages if m.role == 'user' %}<|user|>{{ m.content }}{% endfor %}"
FULL = Prompt(user="Where is the kettle?", system="Be brief.")


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerBase:
    return build_tokenizer()


@pytest.mark.parametrize(
    ("template", "style", "text"),
    [
        (TURNS, Style(), "<|system|>Be brief.<|end|><|user|>Where is the kettle?<|end|>"),
        (PARTS, Style("parts"), "<|system|>Be brief.<|user|>Where is the kettle?"),
        (NO_SYSTEM, Style(system="user"), "<|user|>Be brief.\n\nWhere is the kettle?<|end|>"),
        (DEAF, Style(system="user"), "<|user|>Be brief.\n\nWhere is the kettle?"),
        # Text, where the template takes both.
        (DEAF + PARTS, Style(system="user"), "<|user|>Be brief.\n\nWhere is the kettle?<|user|>"),
    ],
)
def test_messages_are_given_as_the_template_takes_them(
    tokenizer: PreTrainedTokenizerBase, template: str, style: Style, text: str
) -> None:
    tokenizer.chat_template = template
    assert style_of(tokenizer, system=True) == style
    assert conversations(tokenizer, [FULL]) == [text]


@pytest.mark.parametrize("template", ["<|user|>", "{{ messages | length }}"])
def test_a_template_that_leaves_the_prompt_out_is_refused(tokenizer: PreTrainedTokenizerBase, template: str) -> None:
    tokenizer.chat_template = template
    with pytest.raises(ImpossibleJobError, match="leaves the prompt out"):
        conversations(tokenizer, [FULL])


def test_a_template_is_dated_as_it_is_told(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = "{{ strftime_now('%A %d %B %Y %H:%M:%S') }} " + TURNS
    said = [[{"role": "user", "content": "Hello?"}]]
    texts = {rendered(tokenizer, said, Rendering("2026-11-30"))[0] for _ in range(2)}
    assert texts == {"Monday 30 November 2026 12:00:00 <|user|>Hello?<|end|>"}
    assert shows_date(tokenizer)
    tokenizer.chat_template = TURNS
    assert not shows_date(tokenizer)


def test_without_a_date_all_prompts_of_a_process_have_that_of_its_first(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer.chat_template = "{{ strftime_now('%A %d %B %Y') }} " + TURNS
    said = [[{"role": "user", "content": "Hello?"}]]
    rendering._today.cache_clear()
    try:
        for day in (date(2027, 12, 31), date(2028, 1, 1)):
            monkeypatch.setattr(rendering, "date", type("Clock", (date,), {"today": lambda day=day: day}))
            assert rendered(tokenizer, said) == ["Friday 31 December 2027 <|user|>Hello?<|end|>"]
    finally:
        rendering._today.cache_clear()


def test_a_date_that_is_none_is_refused_in_one_line(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = TURNS + "{{ strftime_now('%Y') }}"
    with pytest.raises(ImpossibleJobError, match="month must be in"):
        rendered(tokenizer, [[{"role": "user", "content": "Hello?"}]], Rendering("2026-13-01"))


@pytest.mark.parametrize(
    ("template", "token"),
    [
        (TURNS, "<|end|>"),
        (TURNS.replace("<|end|>", " \n<|end|>\n"), "<|end|>"),
        (TURNS.replace("<|end|>", "\n"), None),
        (TURNS.replace("<|end|>", " kettle<|end|>"), None),
        (NO_SYSTEM.replace("{% if", "{% if messages | length > 1 or", 1), None),  # it accepts no responses
        ("<|channel|>" + TURNS, None),  # an end of one of several messages
    ],
)
def test_the_end_of_a_turn_is_found_in_what_the_template_writes(
    tokenizer: PreTrainedTokenizerBase, template: str, token: str | None
) -> None:
    tokenizer.chat_template = template
    found = end_of_turn(tokenizer)
    assert (None if found is None else tokenizer.convert_ids_to_tokens(found)) == token


def test_only_switches_that_the_template_knows_are_tried(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = TURNS
    assert switched(tokenizer, Rendering("2026-11-30")) == []
    tokenizer.chat_template = TURNS + "{% if enable_thinking is defined and not enable_thinking %}<|end|>{% endif %}"
    assert switched(tokenizer, Rendering("2026-11-30")) == [Rendering("2026-11-30", (("enable_thinking", False),))]
