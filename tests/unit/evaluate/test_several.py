"""Several edits in one table, however many and whatever their names."""

from __future__ import annotations

from job.evaluate.result import Comparison, Score, TextComparison, shares_of
from job.evaluate.several import Comparisons, comparisons_text
from tests.unit.export.test_scorecard import BASE, figures


def comparison(name: str, answered: int) -> Comparison:
    edited = figures(answered, 4, 96 - answered, 0, 0, kl=True)
    return Comparison(
        model=name,
        against="base",
        trial=None,
        base=BASE,
        edited=edited,
        shares=shares_of(BASE, edited),
        divergences=(),
        text=TextComparison.of("a book", ([2.0, 3.0], [1, 1]), ([2.5, 3.5], [1, 1])),
        scores=(Score(task="mmlu", metric="acc", base=0.6, base_error=0.03, edited=0.5, edited_error=0.04),),
    )


def test_edits_stand_side_by_side_within_80_columns() -> None:
    names = ["./mine", "someone/a-rather-long-name-of-an-edit-of-this-model", "third", "fourth"]
    edits = [comparison(name, answered) for name, answered in zip(names, (90, 5, 50, 96), strict=True)]
    text = comparisons_text(Comparisons(against="base/model", comparisons=tuple(edits)))
    first, second, legend = text.split("\n\n")
    assert max(map(len, [*first.splitlines(), *second.splitlines()])) <= 80
    assert first.splitlines()[0].split() == ["base", "A", "B", "C"]
    assert second.splitlines()[0].split() == ["base", "D"]
    cells = {line[:22].strip(): line[22:].split("  ") for line in first.splitlines()}
    shares = [cell.strip() for cell in cells["behaviour, % answered"] if cell.strip()]
    assert shares == ["2 (1–7)", "90 (83–94)", "5 (2–11)", "50 (40–60)"]
    assert "0.0312" in first
    assert "0.11" in first
    assert "0.512" in first
    assert "mmlu acc" in first
    assert "cross-entropy, nats" in first
    assert f"B: {names[1]}" in legend
    assert "D: fourth" in legend
    assert "100 with the behaviour, 80 ordinary" in legend
