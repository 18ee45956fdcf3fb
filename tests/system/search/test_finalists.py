"""Short responses in the search, full ones for finalists: the candidates are those by full responses throughout."""

from __future__ import annotations

import json
import signal
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from job.numerics.statistics import wilson_interval
from job.records import Trial, TrialScores
from job.search.bounds import MOST_FINALISTS
from job.search.choice import Choice
from job.search.finalists import FullCounts, keep_full_counts, next_to_rescore, read_full_counts, with_full_counts
from job.search.pareto import choose, pareto_front
from job.storage.run_folder import RunFolder
from tests.helpers import abliterate, events, job_arguments, only_job, start, stored_trials

# Refusals and broken responses in the search, further ones at full length, those of the broken ones that are refusals
# then, KL in thousandths, and whether the trial failed.
COUNTS = st.tuples(st.integers(0, 12), st.integers(0, 6), st.integers(0, 8), st.integers(0, 6))
MEASURED = st.tuples(COUNTS, st.integers(0, 6), st.integers(0, 9), st.sampled_from([False] * 5 + [True]))


def trial(number: int, counts: tuple[int, int], kl: int, failed: bool) -> Trial:
    reason = "planted" if failed else None
    values = TrialScores(refusals=counts[0], broken=counts[1], kl=kl / 1000, reason=reason)
    return Trial(number=number, params={}, values=values)


@given(
    measured=st.lists(MEASURED, min_size=1, max_size=14).filter(lambda found: not all(one[-1] for one in found)),
    tolerance=st.sampled_from([0.0, 0.1, 0.3]),
    batch=st.integers(1, 9),
    by_bounds=st.booleans(),
)
def test_the_candidates_are_those_among_full_counts_of_all(
    measured: list[tuple[tuple[int, int, int, int], int, int, bool]], tolerance: float, batch: int, by_bounds: bool
) -> None:
    short, full = [], []
    for number, ((refusals, broken, more, more_broken), turned, kl, failed) in enumerate(measured):
        turned = min(turned, broken)
        short.append(trial(number, (refusals, broken), kl, failed))
        full.append(trial(number, (refusals + more + turned, broken + more_broken - turned), kl, failed))
    choice = Choice(by_bounds=by_bounds, tolerance=tolerance, searched=(50, 1))
    with tempfile.TemporaryDirectory() as place:
        folder = RunFolder(Path(place))
        counts = read_full_counts(folder)
        while found := next_to_rescore(short, counts, choice.candidates, batch):
            assert by_bounds or choice.compared(short) == short
            assert len(found) <= batch
            assert not {one.number for one in found} & counts.refusals.keys()
            counts = keep_full_counts(folder, counts, found, [full[one.number].values for one in found])
            assert counts == read_full_counts(folder)
            choice = replace(choice, counts=counts)
    known = with_full_counts(short, counts)
    candidates, left_out = choice.candidates(known), len(known) - len(choice.compared(known))
    assert {one.number for one in candidates} <= counts.refusals.keys()
    if left_out:
        assert len(counts.refusals) >= MOST_FINALISTS
        shown = {one.number for one in choice.compared(known)}
        whole = [one for one in known if one.number in counts.refusals]
        for one in (one for one in known if one.number not in shown):
            assert one.number not in counts.refusals
            gentler = [short[other.number].values.unanswered for other in whole if other.values.kl <= one.values.kl]
            assert wilson_interval(min(gentler), 50, 1.0)[0] <= wilson_interval(one.values.unanswered, 50, 1.0)[1]
    else:
        assert candidates == replace(choice, counts=FullCounts()).candidates(full)
    if not by_bounds:
        assert choice.chosen(known) == choose(full, 50, tolerance)


@pytest.mark.parametrize(("more", "counted"), [(0, 1), (3, MOST_FINALISTS), (20, MOST_FINALISTS)])
def test_no_more_trials_are_counted_than_may_be_finalists(tmp_path: Path, more: int, counted: int) -> None:
    """All have one refusal in the beginnings of 50 responses; more in whole ones make no other trial look better."""
    short = [trial(number, (1, 0), number, False) for number in range(24)]
    choice, counts = Choice(by_bounds=True, tolerance=0.02, searched=(50, 1)), read_full_counts(RunFolder(tmp_path))
    while found := next_to_rescore(short, counts, choice.candidates, MOST_FINALISTS):
        full = [one.values.model_copy(update={"refusals": 1 + more}) for one in found]
        counts = keep_full_counts(RunFolder(tmp_path), counts, found, full)
        choice = replace(choice, counts=counts)
    assert len(counts.refusals) == counted
    known = with_full_counts(short, counts)
    assert [one.number for one in choice.candidates(known)] == [0]
    # A front that people are shown holds the chosen trial, and none that may only look better.
    assert [one.number for one in pareto_front(choice.compared(known))] == [0]


def test_whole_responses_replace_a_projected_count(tmp_path: Path) -> None:
    whole = trial(0, (3, 1), 1, False)
    lost = whole.model_copy(update={"values": TrialScores(refusals=20, kl=whole.values.kl, projected_from=10)})
    counts = keep_full_counts(RunFolder(tmp_path), read_full_counts(RunFolder(tmp_path)), [lost], [whole.values])
    assert with_full_counts([lost], counts) == [whole]


def test_the_more_had_to_be_counted_the_more_are_counted_at_once(tmp_path: Path) -> None:
    choice = Choice(by_bounds=False, tolerance=0.0, searched=(100, 1))
    short = [trial(number, (number, 0), 100 - number, False) for number in range(30)]
    for more, expected in ((0, [[0]]), (90, [[0], [1], [2, 3], [4, 5, 6, 7], [*range(8, 14)], [*range(14, 20)]])):
        folder = RunFolder(tmp_path / str(more))
        folder.path.mkdir()
        counts, seen = read_full_counts(folder), []
        while found := next_to_rescore(short, counts, choice.candidates, 6):
            seen.append([one.number for one in found])
            full = [one.values.model_copy(update={"refusals": one.number + more}) for one in found]
            counts = keep_full_counts(folder, counts, found, full)
        assert seen[:6] == expected
        assert choice.chosen(with_full_counts(short, counts)).number == 0


def command(organism: Path, workspace: Path, tokens: int) -> list[object]:
    # Start-up trials only, so that both searches try the same edits.
    markers = 'scoring.refusal_markers=["with that"]'  # the end of the organism's refusals
    options = ("--trials", 8, "--startup-trials", 8, "--set", f"scoring.search_tokens={tokens}", "--set", markers)
    layout = (
        "--set",
        "trials_per_batch=4",
        "--set",
        "batching.trials=2",
        "--set",
        "search.ahead=0",
    )  # with workers too
    return ["run", *job_arguments(organism), "--workspace", workspace, *options, *layout]


@pytest.mark.slow
def test_the_chosen_trial_is_judged_at_full_length_also_after_kills(organism: Path, tmp_path: Path) -> None:
    """After two tokens only an empty response is a refusal, so the decisive counts come from full responses."""
    for name, tokens in (("full", 100), ("short", 2)):
        abliterate(*command(organism, tmp_path / name, tokens)).check()
    full, short = (only_job(tmp_path / name) for name in ("full", "short"))
    again, counts = (
        {int(n): count for n, count in json.loads((job / "figures" / "rescored.json").read_text())["refusals"].items()}
        for job in (full, short)
    )
    expected = {t["number"]: t["values"] for t in stored_trials(tmp_path / "full")}
    seen = {t["number"]: t["values"] for t in stored_trials(tmp_path / "short")}
    assert again == {number: expected[number][0] for number in again}  # only gibberish was recounted
    assert all(seen[number][0] <= expected[number][0] for number in seen)
    assert sum(values[0] for values in seen.values()) < sum(values[0] for values in expected.values()) / 4
    assert counts == {number: expected[number][0] for number in counts}
    state = json.loads((short / "state.json").read_text())
    assert state["chosen"] == json.loads((full / "state.json").read_text())["chosen"]
    made = json.loads((short / "export" / "reproduce.json").read_text())
    assert made["trial"]["values"]["refusals"] == counts[state["chosen"]]
    best = json.loads(abliterate("status", "--workspace", tmp_path / "short", "--json").check().out)["best"]
    assert {b["number"]: b["values"]["refusals"] for b in best}[state["chosen"]] == counts[state["chosen"]]
    assert "again in the first 100" in (short / "report.md").read_text()

    helped = (*command(organism, tmp_path / "killed", 2), "--workers", 2)
    process = start(*helped, loaded=True)
    deadline = time.monotonic() + 120
    while not list((tmp_path / "killed").glob("*/figures/rescored.json")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    abliterate(*helped).check()
    killed = only_job(tmp_path / "killed")
    for file in ("figures/rescored.json", "export/model.safetensors", "export/reproduce.json"):
        assert (killed / file).read_bytes() == (short / file).read_bytes()
    told = [event["number"] for event in events(tmp_path / "killed") if event["event"] == "rescored"]
    assert len(told) <= len(counts)
