"""Regular expressions of settings: limits of length and time."""

from __future__ import annotations

import re
import signal
import threading

import pytest

from job.errors import UsageError
from job.text import patterns
from job.text.patterns import compiled, count_matches

NAME = "scoring.pattern"


@pytest.fixture(autouse=True)
def short_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patterns, "SECONDS", 0.2)


@pytest.mark.parametrize("text", [r"as an? \w+ model", "", ".*sorry.*but.*", "(never|not)+ .*!", "x" * 10_000])
def test_a_usual_pattern_is_found_in_any_case(text: str) -> None:
    pattern = compiled(NAME, text)
    assert pattern.pattern == text
    answer = "As a language model, NEVER ever. Sorry, but no! " * 20
    assert count_matches(NAME, pattern, answer) == len(re.findall(text, answer, re.IGNORECASE))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("x" * 10_001, "longer than 10000 characters"),
        ("(", "no regular expression"),
        ("a{99999999999999999999}", "no regular expression"),
        ("(" * 3000 + ")" * 3000, "no regular expression"),
        ("(a+)+$", "takes more than"),
        (r"(\w+\s?)+$", "takes more than"),
        ("(x|a|aa)*b", "takes more than"),
    ],
    ids=["long", "open", "huge count", "deep", "nested", "words", "alternatives"],
)
def test_what_cannot_be_used_is_refused(text: str, said: str) -> None:
    with pytest.raises(UsageError, match=f"{NAME} .*{said}"):
        compiled(NAME, text)


def test_a_search_without_end_is_ended_and_nothing_of_its_limit_stays() -> None:
    before = signal.getsignal(signal.SIGVTALRM)
    pattern = compiled(NAME, "(qz+)+!|(?:z+z+)+y")
    assert count_matches(NAME, pattern, "qzz!") == 1
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0.0, 0.0)
    with pytest.raises(UsageError, match="takes more than"):
        count_matches(NAME, pattern, "z" * 100)
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0.0, 0.0)
    assert signal.getsignal(signal.SIGVTALRM) == before


def test_another_thread_needs_no_signals() -> None:
    found: list[int] = []
    thread = threading.Thread(target=lambda: found.append(count_matches(NAME, compiled(NAME, "a+"), "aa ba")))
    thread.start()
    thread.join()
    assert found == [2]
