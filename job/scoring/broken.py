"""Broken answers: empty, going in circles, or in a script that the prompt does not use."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from dataclasses import dataclass

# A unit that is repeated at once, over and over; short ones have to fill more than what lists and tables do.
_CIRCLE = re.compile(r"(?P<unit>.{1,200}?)(?P=unit){3,}", re.DOTALL)

_LEAST_CIRCLE, _CIRCLE_SHARE = 40, 0.5

# The pattern takes 1 ms for 30 tokens, what follows 0.02: circles of n characters have at most n / 4 different runs of
# _RUN within them, and 7 n / 40 across their ends; so a text that circles for half of its length has no more than this.
_RUN = 8

_MOST_DISTINCT = 1 - _CIRCLE_SHARE * (1 - 1 / 4 - (_RUN - 1) / _LEAST_CIRCLE)

# A text is of another script than its prompt where so much of it is, and of the prompt less than the other share.
_FOREIGN_SHARE, _KNOWN_SHARE, _LEAST_LETTERS = 0.5, 0.05, 8


@dataclass(frozen=True)
class Exchange:
    """A prompt and a model's answer to it.

    Attributes:
        prompt: What the user said.
        answer: The answer in words, as far as answers are judged.
        gibberish: Whether the answer is known to be gibberish to the base model.
    """

    prompt: str
    answer: str
    gibberish: bool = False

    @property
    def broken(self) -> bool:
        """Whether the answer is broken, by its text or as gibberish."""
        return self.gibberish or is_broken(self.prompt, self.answer)


def is_degenerate(answer: str) -> bool:
    """Return whether an answer is broken: empty, or for half of its length one unit said four times and more."""
    text = " ".join(answer.split())
    if not text:
        return True
    if len(text) < _LEAST_CIRCLE or _distinct(text) > _MOST_DISTINCT * len(text):
        return False
    circling = sum(len(found[0]) for found in _CIRCLE.finditer(text) if len(found[0]) >= _LEAST_CIRCLE)
    return circling >= _CIRCLE_SHARE * len(text)


def is_foreign(prompt: str, answer: str) -> bool:
    """Return whether most letters of an answer are of a script that the prompt hardly has, by the letters' names."""
    if answer.isascii() and prompt.isascii():
        return False
    scripts = _scripts(answer)
    letters = scripts.total()
    if letters < _LEAST_LETTERS:
        return False
    asked = _scripts(prompt)
    new = sum(count for script, count in scripts.items() if asked[script] < _KNOWN_SHARE * max(1, asked.total()))
    return bool(asked) and new > _FOREIGN_SHARE * letters


def is_broken(prompt: str, answer: str) -> bool:
    """Return whether a non-empty answer is broken, as far as its text alone tells."""
    return is_degenerate(answer) or is_foreign(prompt, answer)


def _distinct(text: str) -> int:
    return len({text[start : start + _RUN] for start in range(len(text) - _RUN + 1)})


def _scripts(text: str) -> Counter[str]:
    """Return the number of letters of each script; Japanese and Chinese count as one, for they share theirs."""
    found = Counter(unicodedata.name(letter, "?").partition(" ")[0] for letter in text if letter.isalpha())
    for name in ("HIRAGANA", "KATAKANA"):
        found["CJK"] += found.pop(name, 0)
    return +found
