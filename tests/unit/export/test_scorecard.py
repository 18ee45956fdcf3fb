"""The scorecard's rows: every count with its interval, within 80 columns."""

from __future__ import annotations

from pathlib import Path

from job.export.model_card import model_card
from job.export.scorecard import agreement_line, group_rows, how, scorecard_rows, thinking_rows
from job.numerics.statistics import wilson_interval
from job.records import Agreement, DetectorReport, Figures, KLFigures, KLSpread, Outcomes, Thinking
from job.report.tables import aligned
from job.scoring.detectors import cohens_kappa
from job.text.behaviour import REFUSAL_WORDS, words_of
from job.text.markup import markdown_table
from tests.helpers import made_from

SPREAD = KLSpread(median=0.01, ninetieth=0.05, largest=0.512, prompt=12)


def outcomes(*counts: int, prompts: str = "bad", column: str | None = None, group: str = "") -> Outcomes:
    names = dict(zip(("answered", "evaded", "refused", "broken", "empty"), counts, strict=True))
    return Outcomes.model_validate({"prompts": prompts, "column": column, "group": group, **names})


def figures(
    *bad: int, groups: tuple[Outcomes, ...] = (), thinking: Thinking | None = None, kl: bool = False
) -> Figures:
    return Figures(
        bad_prompts=100,
        refusals=bad[2],
        good_prompts=80,
        false_refusals=0,
        kl=0.0312 if kl else None,
        kl_interval=(0.02, 0.05) if kl else None,
        kl_spread=SPREAD if kl else None,
        kl_more=KLFigures(tokens=8, mean=0.11, interval=(0.1, 0.12), spread=SPREAD) if kl else None,
        outcomes=(outcomes(*bad), outcomes(80, 0, 0, 0, 0, prompts="good"), *groups),
        thinking=thinking,
    )


BASE = figures(2, 0, 98, 0, 0, groups=(outcomes(0, 0, 9, 0, 0, column="category", group="a|b"),))
EDITED = figures(91, 4, 3, 2, 1, groups=(outcomes(9, 0, 0, 0, 0, column="category", group="a|b"),), kl=True)


def test_the_scorecard_gives_every_count_with_its_interval_in_80_columns() -> None:
    rows = scorecard_rows(BASE, EDITED)
    cells = {name: rest for name, *rest in rows}
    for name, before, after, n in (("with the behaviour: answered", 2, 91, 100), ("without it: refused", 0, 0, 80)):
        low, high = wilson_interval(after, n)
        assert cells[name][1] == f"{after}/{n} ({100 * low:.1f}–{100 * high:.1f} %)"
        assert cells[name][0].startswith(f"{before}/{n} (")
    assert cells["with the behaviour: empty"][1].startswith("1/100")
    assert cells["KL, first token"] == ["0", "0.0312 nats (0.02–0.05)"]
    assert cells["KL, first 8 tokens"] == ["0", "0.11 nats (0.1–0.12)"]
    assert [row[2] for row in rows if row[0] == "median; 90 %; largest"] == ["0.01; 0.05; 0.512 (no. 12)"] * 2
    assert max(map(len, aligned(rows))) <= 80


def test_groups_show_the_outcomes_that_there_are_and_are_escaped_on_the_card(tmp_path: Path) -> None:
    assert [row[0] for row in group_rows(BASE, EDITED)[1:]] == [
        "a|b, with the behaviour: answered",
        "a|b, with the behaviour: refused",
    ]
    assert group_rows(figures(1, 0, 0, 0, 0), EDITED) == []
    card = model_card(made_from(base=BASE, edited=EDITED), tmp_path)
    assert "| a&#124;b, with the behaviour: answered | 0/9" in card
    head, _, rest = card.partition("## Scorecard")
    assert "## " not in head
    assert rest.index(how(REFUSAL_WORDS)) < rest.index("## Use it")
    assert markdown_table(scorecard_rows(BASE, EDITED)) in rest


def test_figures_of_former_versions_show_what_they_counted() -> None:
    former = Figures(bad_prompts=10, refusals=4, good_prompts=5, false_refusals=1, degenerate=2, kl=0.5)
    rows = scorecard_rows(former.model_copy(update={"kl": None}), former)
    assert [row[0] for row in rows[1:]] == [
        "with the behaviour: refused",
        "with the behaviour: broken",
        "without it: refused",
        "without it: broken",
        "KL, first token",
    ]
    assert (rows[1][2][:4], rows[2][2][:4], rows[5][2]) == ("4/10", "2/10", "0.5 nats")


def test_thinking_is_shown_only_where_both_models_were_measured() -> None:
    thinking = Thinking(
        limit=512,
        responses=180,
        thoughts=170,
        unfinished=20,
        median=210,
        ninetieth=512,
        outcomes=(outcomes(80, 0, 0, 20, 20), outcomes(79, 0, 1, 0, 0, prompts="good")),
    )
    measured = figures(91, 4, 3, 2, 1, thinking=thinking, kl=True)
    assert thinking_rows(BASE, measured) == []
    cells = {name: rest for name, *rest in thinking_rows(measured, measured)}
    assert cells["with the behaviour: broken"][1].startswith("20/100")
    assert cells["of them without an end"][1] == "20/170"
    assert cells["thought tokens: median; 90 %"][1] == "210; 512"
    assert max(map(len, aligned(thinking_rows(measured, measured)))) <= 80


def agreement(model: str, pair: str, *counts: int) -> Agreement:
    names = dict(zip(("both", "only_first", "only_second", "neither"), counts, strict=True))
    first, second = pair.split()
    given = {"model": model, "first": first, "second": second, **names, "kappa": cohens_kappa(*counts)}
    return Agreement.model_validate(given)


def test_the_card_says_in_one_line_how_far_detectors_agree(tmp_path: Path) -> None:
    found = [
        agreement("base", "markers soft", 98, 0, 0, 82),
        agreement("base", "markers degenerate", 0, 98, 0, 82),  # zero by construction: nothing is broken
        agreement("edited", "markers soft", 10, 0, 30, 140),
        agreement("edited", "markers my_own", 10, 0, 0, 170),
    ]
    report = DetectorReport(counts=[], agreement=found, failed={"nli": "/home/cook: no such folder"})
    line = agreement_line(report)
    assert "refused or broken" in line
    assert line.endswith(
        ": markers and soft 1.00 (base model), 0.34 (edited model); markers and my_own 1.00 (edited model)."
    )
    assert "with flattery or broken" in agreement_line(report, words_of("flattery"))
    made = made_from(base=BASE, edited=EDITED)
    card = model_card(made, tmp_path, detectors=report)
    assert f"\n{line}\n" in card.partition("## Use it")[0]
    assert "/home/cook" not in card
    silent = report.model_copy(update={"agreement": found[1:2]})
    assert model_card(made, tmp_path, detectors=silent) == model_card(made, tmp_path)
    assert "kappa" not in model_card(made, tmp_path)
