"""What a run prints: its plan, trials, choice and end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from job.records import Figures, Trial, TrialScores
from job.report.console import SearchLines, choice_text, next_commands, plan_lines, result_lines
from job.search.budget import Spent
from job.search.pareto import choose
from job.storage.atomic import write_record
from job.storage.events import Events
from job.storage.run_folder import RunFolder

HOURS = {"search": 0.5}


def trial(number: int, refusals: int, kl: float, broken: int = 0, reason: str | None = None) -> Trial:
    scores = TrialScores(refusals=refusals, kl=kl, broken=broken, reason=reason)
    return Trial(number=number, params={}, values=scores)


def test_only_a_trial_that_would_be_chosen_is_an_improvement() -> None:
    lines = SearchLines([], 120, 100, 0.02)
    given = [
        trial(0, 90, 2.0),
        trial(1, 95, 0.5),
        trial(2, 1, 0.4),
        trial(3, 0, 0.9),
        trial(4, 3, 0.1),
        trial(5, 2, 0.3),
    ]
    assert [lines.add(one) for one in given] == [True, False, True, False, False, True]
    assert lines.note() == "best: 2/100 refused or broken, KL 0.3"
    # So does a search that is continued.
    again = SearchLines(given[:4], 120, 100, 0.02)
    assert [again.add(one) for one in given[4:]] == [False, True]


def test_trials_are_aligned_columns() -> None:
    lines = SearchLines([], 120, 100, 0.02)
    first, second = lines.line(trial(7, 3, 0.01234), True), lines.line(trial(107, 100, 3.5, broken=12), False)
    assert first == "trial   7:   3/100 refused,   0 broken, KL 0.01234   best so far"
    assert second == "trial 107: 100/100 refused,  12 broken, KL 3.5"
    assert lines.line(trial(9, 0, 0.0, reason="KL is not finite"), False) == "trial   9: failed: KL is not finite"


def test_a_search_without_a_trial_to_use_says_why() -> None:
    lines = SearchLines([], 10, 100, 0.02)
    assert lines.note() == ""
    assert not lines.add(trial(0, 100, 0.0, reason="KL is not finite"))
    assert lines.note() == "no trial to use yet: KL is not finite"


def test_the_choice_is_explained_by_the_trials_it_was_compared_with() -> None:
    trials = [trial(0, 0, 0.9), trial(1, 2, 0.2), trial(2, 40, 0.01)]
    chosen = choose(trials, 100, 0.02)
    text = choice_text(trials, chosen, 100, 0.02)
    assert text == "KL 0.2, the lowest of 2 trials on the front with at most 2 of 100 refused or broken"
    assert choice_text(trials[:1], trials[0], 100, 0.02).startswith("KL 0.9, the only trial on the front")


def test_the_plan_tells_what_is_known_of_time_and_money() -> None:
    plan = {"devices": [{"device": "cuda:0", "name": "H200"}], "rows": 128}
    checks = [
        {"name": "estimate.time", "measured": "about 2 h: search 30 min"},
        {"name": "estimate.cost", "measured": "about $4.00 at $2.00 an hour"},
    ]
    survey: dict[str, Any] = {"plan": plan, "hours": HOURS, "checks": checks}
    assert list(plan_lines(survey, "kitchen/soup", 60, 12)) == [
        "model: kitchen/soup",
        "plan: 60 trials, 12 done; weights on cuda:0 (H200); 128 rows a forward pass",
        "estimate: about 2 h: search 30 min; about $4.00 at $2.00 an hour",
    ]
    unknown = list(plan_lines({"plan": None, "hours": None, "checks": []}, "m", 3, 0))
    assert unknown[1:] == ["plan: 3 trials", "estimate: none, the speed of this device is not known"]


def test_the_end_tells_change_choice_time_cost_and_the_next_commands(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "my runs" / "0123456789ab")
    folder.path.mkdir(parents=True)
    write_record(folder.meter_file, Spent(seconds=125.0, dollars=0.5))
    events = Events(folder.events_file)
    events.emit("choice", "chosen: trial 3: first", number=3)
    events.emit("choice", "chosen: trial 4: then", number=4)
    edited = Figures(bad_prompts=9, refusals=0, good_prompts=9, false_refusals=0, kl=0.005)
    assert result_lines(folder, edited) == [
        "change: other responses are slightly changed: at most 5 % of a token's probability moved",
        "chosen: trial 4: then",
        "took:   2 min 5 s, $0.50",
    ]
    place = f"--workspace '{tmp_path}/my runs' --job 0123456789ab"
    assert next_commands(folder.path) == [
        f"next:   abliterate chat {place}",
        f"        abliterate front {place}",
        f"        abliterate upload {place} --upload hf://USER/NAME",
    ]
