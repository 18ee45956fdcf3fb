"""Who is a finalist, what is measured of finalists, and whom a job chooses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from pydantic import ValidationError

from job.data.prompts import Prompt, PromptSets
from job.errors import JobError
from job.records import FinalistScores, JobRecord, Resolution, Trial, TrialScores
from job.search.bounds import MOST_FINALISTS
from job.search.choice import Choice, job_choice, keep_finalists
from job.search.finalists import FullCounts
from job.storage.run_folder import RunFolder


def trial(number: int, refusals: int, kl: float, reason: str | None = None) -> Trial:
    return Trial(number=number, params={}, values=TrialScores(refusals=refusals, kl=kl, reason=reason))


def scores(refusals: int, kl: float, broken: int = 0) -> FinalistScores:
    return FinalistScores(refusals=refusals, broken=broken, kl=(kl, kl, kl), forced_kl=(2 * kl,) * 2)


# The luckiest in the search is not the best on other prompts.
TRIALS = [
    *(trial(0, 0, 0.5), trial(1, 0, 0.03), trial(2, 2, 0.01), trial(3, 5, 0.004)),
    *(trial(4, 0, 0.9, "planted"), trial(5, 60, 0.001)),
]
MEASURED = {1: scores(0, 0.03), 2: scores(9, 0.01), 3: scores(20, 0.004)}
BOUNDS = Choice(by_bounds=True, tolerance=0.02, searched=(100, 1), held_out=40)


def test_finalists_are_those_on_the_front_with_the_fewest_refusals() -> None:
    assert [one.number for one in BOUNDS.candidates(TRIALS)] == [1, 2, 3]
    # 60 of 100 is no bad luck.
    assert [one.number for one in BOUNDS.candidates(TRIALS[5:])] == [5]
    long = [trial(number, 40 - number, number / 100) for number in range(40)]
    assert [one.number for one in BOUNDS.candidates(long)] == [*range(39, 39 - MOST_FINALISTS, -1)]
    assert [one.number for one in BOUNDS.unmeasured(long)] == [*range(40 - MOST_FINALISTS, 40)]
    with pytest.raises(JobError, match="every trial failed"):
        BOUNDS.candidates(TRIALS[4:5])


def test_an_uncounted_trial_is_compared_by_the_beginnings_of_responses() -> None:
    counted = [trial(number, 4, 0.1) for number in range(MOST_FINALISTS)]
    lucky, better, gentler = trial(20, 3, 0.2), trial(21, 0, 0.2), trial(22, 5, 0.05)
    known = [*(one.model_copy(update={"values": trial(0, 30, 0.1).values}) for one in counted), lucky, better, gentler]
    whole = {one.number: 30 for one in counted}
    counts = FullCounts(refusals=whole, beginnings={one.number: one.values for one in counted})
    shown = replace(BOUNDS, counts=counts).compared(known)
    assert [one.number for one in shown] == [*range(MOST_FINALISTS), 21, 22]
    # Files of former versions lack the beginnings: three and none look better than 30 beyond chance.
    former = replace(BOUNDS, counts=FullCounts(refusals=whole))
    assert former.compared(known) == known
    few = FullCounts(refusals=dict(list(whole.items())[1:]), beginnings=counts.beginnings)
    assert replace(BOUNDS, counts=few).compared(known) == known


def test_the_choice_is_by_pooled_figures_once_all_finalists_are_measured() -> None:
    # In the search 2 of 100 were within 2 %, and 11 of 140 are not.
    assert BOUNDS.chosen(TRIALS).number == 2
    assert BOUNDS.reason(TRIALS) is None
    half = BOUNDS.with_measured({1: MEASURED[1]})
    assert [one.number for one in half.unmeasured(TRIALS)] == [2, 3]
    assert half.chosen(TRIALS).number == 1  # an extended search has such a one until its own are measured
    whole = half.with_measured({2: MEASURED[2], 3: MEASURED[3]})
    assert whole.unmeasured(TRIALS) == []
    assert whole.chosen(TRIALS).number == 1
    assert whole.reason(TRIALS) == "0/140 refused, KL 0.03; trial 2 has KL 0.01 but 11/140"
    # Further trials, as of an extended search, are finalists to measure like the first.
    assert [one.number for one in whole.unmeasured([*TRIALS, trial(6, 1, 0.02)])] == [6]
    alone = BOUNDS.with_measured({1: MEASURED[1]})
    assert (
        alone.reason([TRIALS[1], TRIALS[5]]) == "0/140 refused, KL 0.03; trial 5 has KL 0.001 but 60/100 in the search"
    )


def test_figures_on_prompts_held_out_leave_out_those_of_the_search() -> None:
    measured = FinalistScores(refusals=3, broken=1, kl=(9.0, 0.1, 0.3), forced_kl=(0.2, 0.6))
    found = BOUNDS.with_measured({1: measured}).figures(1)
    assert found is not None
    assert (found.searched, found.bad_prompts, found.refusals, found.broken, found.good_prompts) == (100, 40, 3, 1, 2)
    assert (found.kl, found.forced_kl, found.forced_tokens) == (pytest.approx(0.2), pytest.approx(0.4), 8)
    assert BOUNDS.figures(1) is None
    none = Choice(by_bounds=True, tolerance=0.02, searched=(100, 3), measured={1: measured})
    assert none.figures(1) is None


def test_a_job_of_a_former_version_keeps_its_rule(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    one = (Prompt(user="Where is the kettle?"),)
    sets = dict.fromkeys(("good", "bad", "good_search", "bad_search", "good_report", "bad_report"), one)
    prompts = PromptSets(**sets, good_choice=one * 2, bad_choice=one * 20, sources={}, commits={})
    record = JobRecord(job_id="0" * 12, identity={}, settings={}, startup_trials=1, versions={})
    keep_finalists(folder, BOUNDS.with_measured(MEASURED))
    for resolution, by_bounds in (
        (None, False),
        (Resolution(dtype="float32", rows=1, layers=1), False),
        (Resolution(dtype="float32", rows=1, layers=1, choice="bounds"), True),
    ):
        found = job_choice(folder, record.model_copy(update={"resolution": resolution}), prompts, 0.02)
        assert found.by_bounds is by_bounds
        assert found.measured == MEASURED
        assert found.searched == (1, 1)
    former = Choice(by_bounds=False, tolerance=0.02, searched=(100, 1), held_out=40, measured=MEASURED)
    assert former.unmeasured(TRIALS) == []
    assert former.chosen(TRIALS).number == 2
    assert former.reason(TRIALS) is None


def test_scores_that_do_not_fit_the_prompts_are_measured_again(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    one = (Prompt(user="Where is the kettle?"),)
    sets = dict.fromkeys(("good", "bad", "good_search", "bad_search", "good_report", "bad_report"), one)
    prompts = PromptSets(**sets, good_choice=one * 2, bad_choice=one * 20, sources={}, commits={})
    record = JobRecord(job_id="0" * 12, identity={}, settings={}, startup_trials=1, versions={})
    wrong = {
        1: scores(21, 0.1),
        2: scores(10, 0.1, broken=11),
        3: scores(0, 0.1).model_copy(update={"kl": (0.1, 0.1)}),
        4: scores(0, 0.1).model_copy(update={"forced_kl": ()}),
    }
    keep_finalists(folder, BOUNDS.with_measured({**wrong, 5: scores(10, 0.1, broken=10)}))
    assert job_choice(folder, record, prompts, 0.02).measured.keys() == {5}
    for values in ({"kl": [-0.1]}, {"kl": [float("inf")]}, {"refusals": -1}):
        with pytest.raises(ValidationError):
            FinalistScores.model_validate({**scores(0, 0.1).model_dump(), **values})
