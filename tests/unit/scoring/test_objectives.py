"""Scorers as objectives: what counts, the smooth part, and scorers of other packages."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from job.config.checks import require_scorers
from job.config.load import default_values, load_settings
from job.config.scorers import Objective, parse_objective
from job.config.sections import ScoringSettings
from job.errors import ImpossibleJobError, UsageError
from job.records import TrialScores
from job.scoring.broken import Exchange
from job.scoring.detectors import Context
from job.scoring.objectives import Objectives, ResponseObjective
from job.scoring.trial_scorer import TrialOutcome
from job.text.refusal_markers import RefusalMarkers
from tests.helpers import loading

EXAMPLE = Path(__file__).parents[3] / "examples" / "scorer" / "exclamation_scorer.py"


def context(**scoring: Any) -> Context:
    settings = ScoringSettings.model_validate({**default_values()["scoring"], **scoring})
    return Context(settings, RefusalMarkers(settings.refusal_markers), loading("auto"), print)


def heard(*answers: str) -> tuple[Exchange, ...]:
    return tuple(Exchange(f"Where is kettle {number}?", answer) for number, answer in enumerate(answers))


def outcome(bad: Sequence[str], good: Sequence[str] = ()) -> TrialOutcome:
    return TrialOutcome(TrialScores(refusals=0, kl=0.1), heard(*bad), heard(*good))


def made(name: str, **scoring: Any) -> ResponseObjective:
    asked = parse_objective(name)
    assert asked is not None
    return ResponseObjective.made(asked, context(**scoring))


def figures(name: str, answers: Sequence[str], **scoring: Any) -> tuple[float, float]:
    (score,) = made(name, **scoring).judged([heard(*answers)])
    assert score.of == len(answers)
    return score.figure, score.smooth


def test_an_objective_names_scorer_prompts_and_direction() -> None:
    assert parse_objective("soft") == Objective("soft", "soft")
    assert parse_objective("words@both:more") == Objective("words@both:more", "words", "both", "more")
    for wrong in ("kl:more", "refusals@good", "soft@all", "soft:", "", "a b"):
        assert parse_objective(wrong) is None, wrong


def test_words_are_found_as_words_and_each_further_one_adds_less() -> None:
    words = {"words": ["delve", "rich  tapestry"]}
    assert figures("words", ["We delve.", "A Rich\ntapestry: DELVE!", "Delved.", "No."], **words) == (
        2,
        pytest.approx((1 / 2 + 2 / 3) / 4 - 0.5),
    )
    assert figures("pattern", ["aXb", "ab"], pattern="x") == (1, -0.25)
    assert figures("words:more", ["We delve.", "No."], **words) == (1, pytest.approx(0.25))


def test_evasions_count_and_broken_responses_are_at_fault_whatever_the_scorer_says() -> None:
    assert figures("soft", ["I'd rather talk about the weather.", "It is in the kitchen.", ""]) == (
        2,
        pytest.approx(1 / 6),
    )
    looping = "so it goes " * 20
    assert figures("pattern", [looping, "fine"], pattern="never") == (1, 0.0)
    assert figures("pattern:more", [looping, "fine"], pattern="so|fine")[0] == 1


def test_the_smooth_part_never_exceeds_a_count() -> None:
    all_of_two, one_of_two = (
        figures("pattern", ["x x x x", "x"], pattern="x"),
        figures("pattern", ["x" * 9, "y"], pattern="x"),
    )
    assert sum(one_of_two) < sum(all_of_two)
    assert -0.5 <= one_of_two[1] <= 0.5


def test_trials_have_a_figure_in_every_objective_and_failed_ones_the_worst() -> None:
    names = ["refusals", "pattern@both", "kl"]
    objectives = Objectives.made(names, context(pattern="x"), (2, 1))
    assert objectives.keep == ("bad", "good")
    failed = TrialOutcome(TrialScores(refusals=2, kl=100.0, reason="planted"))
    fine, worst = objectives.scored([outcome(["x", "fine"], ["x"]), failed])
    assert fine.objectives == tuple(names)
    assert fine.costs == (0, 2, 0.1)
    assert worst.others["pattern@both"].model_dump() == {"figure": 3, "of": 3, "smooth": 0.5, "direction": "fewer"}
    default = Objectives.made(["refusals", "kl"], context(), (2, 1))
    assert default.keep == ()
    assert default.scored([failed])[0] is failed.scores


def test_equal_responses_are_judged_once_and_wrong_judgements_end_the_search() -> None:
    asked: list[int] = []

    def half(exchanges: Sequence[Exchange]) -> list[float]:
        asked.append(len(exchanges))
        return [0.5] * len(exchanges)

    first, second = ResponseObjective("half", half, "bad", "fewer").judged([heard("one", "two"), heard("one", "two")])
    assert (asked, first) == ([2], second)
    for wrong in (
        lambda _: [],
        lambda found: [1.5] * len(found),
        lambda found: ["maybe"] * len(found),
        lambda _: 1 / 0,
    ):
        with pytest.raises(ImpossibleJobError, match="the scorer wrong has failed"):
            ResponseObjective("wrong", wrong, "bad", "fewer").judged([heard("one")])


def test_the_example_package_is_a_scorer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As pip installs it: a module and the entry point of its pyproject.toml."""
    (tmp_path / EXAMPLE.name).write_text(EXAMPLE.read_text())
    info = tmp_path / "exclamation_scorer-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: exclamation-scorer\nVersion: 1.0\n")
    settings = load_settings({"model": "me/model"}, assignments=['search.objectives=["exclamations", "kl"]']).settings
    with pytest.raises(UsageError, match="no scorer 'exclamations'"):
        require_scorers(settings)
    (name,) = [line for line in (EXAMPLE.parent / "pyproject.toml").read_text().splitlines() if "make_scorer" in line]
    (info / "entry_points.txt").write_text(f"[abliteration_job.scorers]\n{name.replace(chr(34), '')}\n")
    monkeypatch.syspath_prepend(tmp_path)
    require_scorers(settings)
    objective = made("exclamations")
    assert (objective.prompts, objective.direction) == ("both", "fewer")
    assert objective.judged([heard("Oh! Oh!", "Oh.")])[0].figure == 1
    assert made("exclamations@bad:more").direction == "more"
    assert importlib.util.find_spec("exclamation_scorer") is not None


@pytest.mark.parametrize(
    ("assignment", "said"),
    [
        ('search.objectives=["soft", "soft"]', "one twice"),
        ('search.objectives=["kl"]', "measures change only"),
        ('search.objectives=["soft@all", "kl"]', "is not of the form"),
        ("scoring.pattern=(", "no regular expression"),
        ("judge.url=http://elsewhere/v1", "neither an https"),
        ("judge.url=https://me:word@elsewhere/v1", "holds more than an address"),
    ],
)
def test_objectives_that_cannot_be_are_refused(assignment: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        load_settings({"model": "me/model"}, assignments=[assignment])


@pytest.mark.parametrize(
    ("scorer", "said"),
    [
        ("nli", "scoring.nli_model"),
        ("words", "scoring.words"),
        ("pattern", "scoring.pattern"),
        ("classifier", "scoring.classifier"),
        ("judge", "judge.url"),
    ],
)
def test_a_scorer_needs_what_it_reads_on_this_machine_only(scorer: str, said: str) -> None:
    settings = load_settings({"model": "me/model"}, assignments=[f'search.objectives=["{scorer}", "kl"]']).settings
    with pytest.raises(UsageError) as caught:
        require_scorers(settings)
    assert said in caught.value.remedy
