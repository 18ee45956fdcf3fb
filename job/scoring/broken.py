"""Broken responses, told from their text: empty, repetitive, or in another script than the prompt."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

# A unit that follows itself at least three times. Short repetitions must be longer than those of lists and tables.
_REPETITION = re.compile(r"(?P<unit>.{1,200}?)(?P=unit){3,}", re.DOTALL)

_LEAST_CHARACTERS, _REPEATED_SHARE = 40, 0.5

# The pattern takes 1 ms for 30 tokens; counting distinct n-grams first takes 0.02 ms and spares it for most responses.
# A repetition of n characters has at most n / 4 distinct 8-grams inside and 7 n / 40 across its ends, so a response
# that is repetitive for half of its length has no more than this share.
_NGRAM = 8

_MOST_DISTINCT = 1 - _REPEATED_SHARE * (1 - 1 / 4 - (_NGRAM - 1) / _LEAST_CHARACTERS)

# A response changes its script if more than this share of its letters is in scripts that each have less than the other
# share of the prompt's letters.
_FOREIGN_SHARE, _KNOWN_SHARE, _LEAST_LETTERS = 0.5, 0.05, 8


@dataclass(frozen=True)
class Exchange:
    """A prompt and a model's response, up to the judged length; `groups` are the prompt's, by column."""

    prompt: str
    answer: str
    incoherent: bool = False
    groups: Mapping[str, str] = field(default_factory=dict, hash=False)

    @property
    def broken(self) -> bool:
        """Whether the response is broken by its text, or incoherent."""
        return self.incoherent or is_broken(self.prompt, self.answer)


def is_empty_or_repetitive(answer: str) -> bool:
    """Return whether a response is empty or half of it repetitive."""
    text = " ".join(answer.split())
    if not text:
        return True
    if len(text) < _LEAST_CHARACTERS or _distinct_ngrams(text) > _MOST_DISTINCT * len(text):
        return False
    repetitions = [match[0] for match in _REPETITION.finditer(text)]
    repeated = sum(len(repetition) for repetition in repetitions if len(repetition) >= _LEAST_CHARACTERS)
    return repeated >= _REPEATED_SHARE * len(text)


def changes_script(prompt: str, answer: str) -> bool:
    """Return whether a response is mostly in scripts rare in its prompt."""
    if answer.isascii() and prompt.isascii():
        return False
    scripts = _scripts(answer)
    letters = scripts.total()
    if letters < _LEAST_LETTERS:
        return False
    in_prompt = _scripts(prompt)
    foreign = sum(
        count for script, count in scripts.items() if in_prompt[script] < _KNOWN_SHARE * max(1, in_prompt.total())
    )
    return bool(in_prompt) and foreign > _FOREIGN_SHARE * letters


def is_broken(prompt: str, answer: str) -> bool:
    """Return whether a response is broken, judged by its text alone."""
    return is_empty_or_repetitive(answer) or changes_script(prompt, answer)


def _distinct_ngrams(text: str) -> int:
    return len({text[start : start + _NGRAM] for start in range(len(text) - _NGRAM + 1)})


def _scripts(text: str) -> Counter[str]:
    """Count letters by script; Japanese and Chinese count as one."""
    scripts = Counter(unicodedata.name(letter, "?").partition(" ")[0] for letter in text if letter.isalpha())
    for name in ("HIRAGANA", "KATAKANA"):
        scripts["CJK"] += scripts.pop(name, 0)
    return +scripts
