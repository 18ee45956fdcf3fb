"""The layout of forwards: measured, within memory, cached, pinned; and its effect on the values."""

from __future__ import annotations

import json
from pathlib import Path

import optuna
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from job.config.load import default_values
from job.data.prompts import Prompt
from job.directions.residuals import extract_residuals
from job.edits.hooks import Intervention
from job.model.loading import load_model
from job.numerics.basis import Basis
from job.numerics.directions import mean_difference
from job.scoring.prompt_batches import PromptBatches
from job.scoring.trial_scorer import TrialScorer
from job.search.space import SearchSpace
from job.text.refusal_markers import RefusalMarkers
from job.tuning.batch_size import Bench
from job.tuning.layouts import (
    ALIKE,
    LAYOUTS,
    Layouts,
    MeasuredLayout,
    Remembered,
    best_of,
    climb,
    read_layouts,
    remember,
)
from job.tuning.memory_probe import Gauge
from tests.helpers import abliterate, alone, events, job_arguments, loading, only_job, run_script, stored_trials


class Machine:
    """A machine with a given trial time by rows, and a given amount of memory."""

    def __init__(self, seconds: dict[int, float], most: int = 10**9) -> None:
        self.seconds, self.most, self.tried = seconds, most, list[int]()

    def measure(self, rows: int) -> MeasuredLayout:
        self.tried.append(rows)
        return MeasuredLayout(
            rows=rows, seconds=None if rows > self.most else self.seconds.get(rows, 9.0), growth=(rows,)
        )

    def climb(self, rule: int, most: int = 1024, measurements: int = 99) -> list[MeasuredLayout]:
        forwards = lambda rows: -(-1000 // rows)  # noqa: E731 - what it is called where it is handed over
        rows = (4, 16, most)
        return climb(self.measure, forwards, rule=rule, rows=rows, may_go_on=lambda: len(self.tried) < measurements)


FALLING = {16: 8.0, 32: 4.0, 64: 2.0, 128: 1.0, 192: 0.8, 256: 1.1, 512: 1.9, 1024: 1.0}


def test_doubling_goes_on_until_trials_get_slower_then_the_best_is_looked_for_in_between() -> None:
    machine = Machine(FALLING)
    found = machine.climb(rule=256)
    assert machine.tried == [256, 16, 32, 64, 128, 512, 192, 160]  # without 1024: 512 was far slower
    chosen = best_of(found)
    assert chosen is not None
    assert chosen.rows == 192


def test_what_lies_below_the_end_of_memory_is_found_by_bisection() -> None:
    rising = {rows: 1000 / rows for rows in range(1, 2000)}
    machine = Machine(rising, most=430)
    chosen = best_of(machine.climb(rule=64))
    assert chosen is not None
    assert chosen.rows == 384
    assert machine.tried[-2:] == [512, 384]  # 448 takes three forwards, as 384 does
    # If not even the first fits, halves are tried, down to one row per trial.
    little = Machine(rising, most=9)
    assert best_of(little.climb(rule=64)) == MeasuredLayout(rows=8, seconds=125.0, growth=(8,))
    assert best_of(Machine(rising, most=3).climb(rule=64)) is None


def test_layouts_that_make_the_same_forwards_are_not_told_apart() -> None:
    machine = Machine({16: 8.0, 32: 4.0, 64: 3.0, 128: 2.0, 256: 1.0, 512: 0.99, 1024: 0.98})
    found = machine.climb(rule=256)
    assert machine.tried == [256, 16, 32, 64, 128, 512, 1024]  # 768 takes two forwards, as 512 does
    chosen = best_of(found)
    assert chosen is not None
    assert chosen.rows == 256  # as fast as the others but for noise, and smaller


@given(
    st.lists(st.floats(0.1, 9), min_size=1, max_size=13),
    st.integers(4, 2000),
    st.sampled_from([16, 64, 256, 1024]),
    st.integers(1, 12),
)
def test_what_is_chosen_fits_and_is_no_slower_than_the_rule(
    times: list[float], most: int, rule: int, measurements: int
) -> None:
    seconds = {rows: times[rows // 4 % len(times)] for rows in range(4, 1025, 4)}
    machine = Machine(seconds, most)
    found = machine.climb(rule, measurements=measurements)
    assert machine.tried[0] == rule
    assert len(machine.tried) == len(set(machine.tried)) <= max(measurements, 1)
    assert all(4 <= rows <= 1024 for rows in machine.tried)
    chosen = best_of(found)
    if rule <= most:
        assert chosen is not None
        assert chosen.rows <= most
        assert chosen.seconds is not None
        assert chosen.seconds <= ALIKE * seconds[rule]


def test_a_file_that_is_not_ours_is_left_alone_and_one_that_is_grows(tmp_path: Path) -> None:
    assert read_layouts(tmp_path) == Layouts()
    one = MeasuredLayout(rows=64, seconds=0.5, growth=(1, 2))
    for number, about in enumerate(({"model": "a"}, {"model": "b"}, {"model": "a"})):
        layouts = read_layouts(tmp_path)
        assert layouts is not None
        chosen = one.model_copy(update={"rows": 64 + number})
        remember(tmp_path, layouts, Remembered(about=about, chosen=chosen, measured=[one]))
    layouts = read_layouts(tmp_path)
    assert layouts is not None
    assert [(kept.about["model"], kept.chosen.rows) for kept in layouts.layouts] == [("b", 65), ("a", 66)]
    for content in (b"", b"\xff\x00", b"[]", b'{"version": 2, "layouts": []}', b'{"layouts": [{"rows": 5}]}'):
        (tmp_path / LAYOUTS).write_bytes(content)
        assert read_layouts(tmp_path) is None


@alone
def test_the_gauge_sees_what_is_taken_and_given_back() -> None:
    gauge = Gauge(torch.nn.Linear(2, 2), 1)
    for megabytes in (300, 30):
        gauge.begin()
        taken = torch.ones(megabytes, 1 << 18)  # a float is four bytes
        del taken
        (growth,) = gauge.growth()
        # The kernel counts in multiples of several pages.
        assert (megabytes - 1) << 20 <= growth < (megabytes + 20) << 20
    gauge.begin()
    assert gauge.growth()[0] < 20 << 20
    assert gauge.fits(gauge.room)
    assert not gauge.fits([room + 1 for room in gauge.room])
    assert Gauge(torch.nn.Linear(2, 2), 4).room[0] < 0.5 * gauge.room[0]


@alone
def test_on_a_cpu_more_than_there_is_room_for_is_not_even_tried() -> None:
    gauge = Gauge(torch.nn.Linear(2, 2), 1)
    gauge.room = [200 << 20]
    tried = []

    def score(rows: int) -> None:
        tried.append(rows)
        torch.ones(rows, 1 << 18)  # a MiB per row

    bench = Bench(score, gauge, 1, 1.0)
    assert [bench.measure(rows).seconds is not None for rows in (32, 64, 128, 256)] == [True, True, True, False]
    assert set(tried) == {32, 64, 128}
    # Elsewhere in the job, rows may be four times longer.
    assert [Bench(score, gauge, 1, 4.0).measure(rows).seconds is not None for rows in (32, 64)] == [True, False]


# Memory ends as little above its use at that point as lets any size fit: how much that is varies from run to run.
SHORT = """
import ctypes, resource, sys
M_ARENA_MAX = -8
assert ctypes.CDLL(None).mallopt(M_ARENA_MAX, 1)  # a thread's arena reserves 64 MB of addresses
from pathlib import Path
from job.errors import MemoryShortageError
from job.storage.events import Events
from job.scoring.prompt_batches import PromptBatches
from job.scoring.trial_scorer import TrialScorer
from job.tuning.layouts import read_layouts
from job.model.loading import load_model
from job.data.prompts import Prompt, PromptSets
from job.records import JobRecord
from job.text.refusal_markers import RefusalMarkers
from job.config.load import load_settings
from job.tuning.batch_size import Tuner
from tests.helpers import loading

folder, workspace = Path(sys.argv[1]), Path(sys.argv[2])
loaded = load_model(folder / "model", loading("float32"), lambda _: None)
settings = load_settings({"model": str(folder), "trials_per_batch": 4}).settings
sets = {name: [Prompt(user=line * 10) for line in (folder / f"{name}.txt").read_text().splitlines()[:30]]
        for name in ("good_train", "bad_train", "good_test", "bad_test")}
prompts = PromptSets(good=sets["good_train"], bad=sets["bad_train"], good_search=sets["good_test"],
                     bad_search=sets["bad_test"], good_report=(), bad_report=(), sources={}, commits={}, public=())
record = JobRecord(job_id="-", identity={"model": "-"}, settings={}, startup_trials=1, versions={})
made = []

def scorer(good, bad, rows):
    made.append(TrialScorer.measured(PromptBatches.of(loaded, good, bad, rows), RefusalMarkers(["sorry"]), 4))
    return made[-1]

tuner = Tuner(workspace, record, settings, prompts, loaded, scorer, 4, 1, Events())
scorer(prompts.good_search[:4], prompts.bad_search[:4], 4)
taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
for room in range(20, 80, 3):
    resource.setrlimit(resource.RLIMIT_AS, (taken + room * 1_000_000, resource.RLIM_INFINITY))
    try:
        print(tuner.rows(64))
        break
    except MemoryShortageError:
        continue
"""


@pytest.mark.full("checkpoints")
def test_under_a_real_limit_a_layout_is_found_that_fits(full_organism: Path, tmp_path: Path) -> None:
    done = run_script(SHORT, full_organism, tmp_path).check()
    layouts = read_layouts(tmp_path)
    assert layouts is not None
    (kept,) = layouts.layouts
    assert kept.chosen.rows == int(done.out.splitlines()[-1])
    fitting = {one.rows: one.seconds is not None for one in kept.measured}
    assert fitting[kept.chosen.rows]
    assert not all(fitting.values())
    # A larger size may fit where a smaller one did not: the limit counts addresses, and freed memory is in pieces.
    assert kept.chosen == best_of(kept.measured)


def layout(workspace: Path) -> dict[str, object]:
    """Return the layout of rows in job.json."""
    found = json.loads((only_job(workspace) / "job.json").read_text())["resolution"]
    return {name: found[name] for name in ("rows", "search_rows", "together")}


@pytest.mark.slow
def test_a_job_is_tuned_once_and_the_next_one_on_the_model_remembers(organism: Path, tmp_path: Path) -> None:
    workspace, again, by_hand = (tmp_path / name for name in ("runs", "again", "by-hand"))
    arguments = ["run", *job_arguments(organism), "--trials", "4"]
    first = abliterate(*arguments, "--workspace", workspace, "--tune", process=True).check()  # its memory is measured
    assert "measuring which batch size is fastest" in first.err
    tuned = [event for event in events(workspace) if event["event"] == "tuned"]
    assert len(tuned) == 1
    rows = tuned[0]["rows"]
    assert layout(workspace) == {"rows": rows, "search_rows": None, "together": 4}
    measured = {one["rows"]: one["seconds"] for one in tuned[0]["measured"]}
    # With 20 prompts for each of 4 trials at most 128 rows have work.
    assert {min(tuned[0]["rule"], 128), 16, 32} <= measured.keys()
    assert measured[rows] <= ALIKE * min(measured.values())

    # The result is only a layout: the job is the same, and continuing it measures nothing.
    abliterate(*arguments, "--workspace", workspace, "--tune", "--trials", "8").check()
    abliterate(*arguments, "--workspace", workspace, "--trials", "8").check()
    assert sum(event["event"] in ("tuning", "tuned") for event in events(workspace)) == 2
    assert layout(workspace)["rows"] == rows

    # Trials equal those of a job with a fixed layout.
    abliterate(*arguments, "--workspace", by_hand, "--trials", "8", "--set", f"batching.rows={rows}").check()
    assert stored_trials(by_hand) == stored_trials(workspace)

    # Another job reuses it; results for other prompts or devices would not apply.
    again.mkdir()
    kept = json.loads((workspace / LAYOUTS).read_text())
    assert len(kept["layouts"]) == 1
    kept["layouts"][0]["chosen"]["rows"] = 48
    other = {**kept["layouts"][0], "about": {**kept["layouts"][0]["about"], "device": "another"}}
    (again / LAYOUTS).write_text(json.dumps({**kept, "layouts": [other, *kept["layouts"]]}))
    second = abliterate(*arguments, "--workspace", again, "--seed", 1, "--tune").check()
    assert "48 rows per forward pass, as measured earlier for this model and device" in second.err
    assert "measuring which batch size" not in second.err
    assert layout(again)["rows"] == 48


@pytest.mark.slow
def test_a_file_of_layouts_that_is_not_ours_costs_a_warning(organism: Path, tmp_path: Path) -> None:
    (tmp_path / LAYOUTS).write_text("some notes")
    arguments = [*job_arguments(organism), "--workspace", tmp_path, "--trials", "1", "--set", "trials_per_batch=1"]
    told = abliterate("run", *arguments, "--tune").check().err
    assert f"warning: {tmp_path / LAYOUTS} is unreadable or of another program" in told
    assert "rows per forward pass; seconds per trial:" in told
    assert (tmp_path / LAYOUTS).read_text() == "some notes"


def test_tuning_does_not_go_together_with_rows_by_hand(random_model_folder: Path, tmp_path: Path) -> None:
    arguments = ["run", random_model_folder, "--workspace", tmp_path / "runs", "--tune", "--set", "batching.rows=64"]
    abliterate(*arguments).fails(2, "batching.rows = 64 is set", "leave out one of them")
    shown = abliterate("config", "show", ABLITERATE_TUNE="true").check().out
    assert "tune = true  # environment" in shown


def test_values_agree_between_layouts(full_organism: Path) -> None:
    """The stated tolerance: in float32 the same refusals, and KL within a thousandth and 1e-6 nats."""
    loaded = load_model(full_organism / "model", loading("float32"), lambda _: None)
    sets = {
        name: [Prompt(user=line) for line in (full_organism / f"{name}.txt").read_text().splitlines()[:50]]
        for name in ("good_train", "bad_train", "good_test", "bad_test")
    }
    residuals = [
        extract_residuals(loaded, loaded.tokenize(sets[name]), 50, lambda _: None)[:, 1:]
        for name in ("good_train", "bad_train")
    ]
    markers = RefusalMarkers(default_values()["scoring"]["refusal_markers"])
    batches = PromptBatches.of(loaded, sets["good_test"], sets["bad_test"], 64)
    scorer = TrialScorer.measured(batches, markers, 30, kl_tokens=2)
    space = SearchSpace("wide", loaded.architecture.layer_count)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=3))
    edits = [space.edit(study.ask(space.distributions()).params) for _ in range(8)]
    basis = Basis.single(mean_difference(*residuals))
    with Intervention(loaded.model, loaded.architecture, basis, "none") as intervention:
        found = {
            rows: [*scorer.scores(intervention, edits[:4], rows), *scorer.scores(intervention, edits[4:], rows)]
            for rows in (256, 64, 16)
        }
    assert len({score.refusals for score in found[256]}) > 1
    assert len({score.kl for score in found[256]}) == 8
    for rows in (64, 16):
        for one, other in zip(found[rows], found[256], strict=True):
            assert one.refusals == other.refusals
            assert one.kl == pytest.approx(other.kl, rel=1e-3, abs=1e-6)
            assert one.opening == pytest.approx(other.opening, abs=1e-4)
