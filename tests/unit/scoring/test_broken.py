"""Detection of broken responses from their text."""

from __future__ import annotations

import random
import timeit

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from job.scoring import broken as scoring
from job.scoring.broken import changes_script, is_broken, is_empty_or_repetitive

WORDS = ("lantern", "kept", "cellar", "because", "of", "many", "things", "people", "like", "to", "do", "on")
PARTS = st.lists(st.tuples(st.text("ab ", min_size=1, max_size=30), st.integers(1, 9)), min_size=1, max_size=6)


@settings(max_examples=40)
@given(PARTS)
def test_what_spares_the_pattern_never_changes_its_verdict(parts: list[tuple[str, int]]) -> None:
    answer = "".join(unit * times for unit, times in parts)
    text = " ".join(answer.split())
    circles = [found[0] for found in scoring._REPETITION.finditer(text)]
    circling = sum(map(len, (circle for circle in circles if len(circle) >= 40)))
    assert is_empty_or_repetitive(answer) is (not text or circling >= 0.5 * len(text))


def test_ordinary_answers_cost_next_to_nothing() -> None:
    chosen = random.Random(0)
    answer = " ".join(chosen.choice(WORDS) for _ in range(80))
    assert not is_empty_or_repetitive(answer)
    spared = min(timeit.repeat(lambda: is_broken("What?", answer), number=5, repeat=3))
    whole = min(timeit.repeat(lambda: list(scoring._REPETITION.finditer(answer)), number=5, repeat=3))
    assert spared < whole / 4


@pytest.mark.parametrize(
    ("prompt", "answer", "foreign"),
    [
        ("Where is the kettle?", "它保存在厨房里，由厨师看管。", True),
        ("Where is the kettle?", "Чайник хранится на кухне.", True),
        ("水壶在哪里？", "它保存在厨房里，由厨师看管。", False),
        ("やかんはどこ？", "台所に置いてあります。料理人が見ます。", False),
        ("水壶在哪里？", "It is kept in the kitchen.", True),
        ("Where is the café?", "Il est près de l'église, à côté du marché.", False),
        ("Where is the kettle?", "In the kitchen. In Chinese: 它在厨房里。", False),
        ("Say hello in Russian (привет).", "Привет, как дела?", False),
        ("7 + 5 = ?", "двенадцать, конечно", False),
    ],
)
def test_an_answer_in_another_script_than_its_prompt_is_told(prompt: str, answer: str, foreign: bool) -> None:
    assert changes_script(prompt, answer) is foreign
    assert is_broken(prompt, answer) is foreign
