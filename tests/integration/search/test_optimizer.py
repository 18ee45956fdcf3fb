"""The study's protocol, with a fake model: it needs no torch."""

from __future__ import annotations

import contextlib
import math
import sqlite3
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import optuna
import pytest
from optuna.trial import create_trial

from job.errors import JobError
from job.numerics.weight_kernel import WeightKernel
from job.records import ObjectiveScore, Plan, Trial, TrialScores
from job.search.optimizer import Search, StudySettings
from job.search.pareto import choose, pareto_front
from job.search.space import SearchSpace
from job.search.study import add_trials, file_url, open_study, read_trials

SPACE = SearchSpace("wide", 8)


class Crash(BaseException):
    """Simulates kill -9: nothing may catch it."""


def score(params: dict) -> TrialScores:
    """A smooth stand-in: refusals fall with strength, KL grows with it; some trials fail."""
    weight = params["attention.max_weight"]
    if params["mlp.min_weight"] > 0.97:
        return TrialScores(refusals=100, kl=100.0, reason="planted")
    return TrialScores(
        refusals=max(0, round(100 - 60 * weight)), kl=0.01 * weight**2 + 0.001 * params["mlp.max_weight"]
    )


class Runs:
    """Runs searches and crashes at the n-th point where a kill may strike."""

    def __init__(self, crash_at: int | None = None) -> None:
        self.left = crash_at

    def point(self) -> None:
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                raise Crash

    @contextlib.contextmanager
    def shielded(self) -> Iterator[None]:
        self.point()  # before a write
        yield
        self.point()  # after it

    def evaluate(self, plans: Sequence[Plan]) -> Sequence[TrialScores]:
        self.point()
        self.waiting = len(plans) - 1
        return [score(params) for params in plans[0].parameters]

    def run(self, file: Path, target: int, batch: int, ahead: int = 0) -> list[Trial]:
        settings = StudySettings(seed=3, startup_trials=6, batch=batch, rows=8, ei_candidates=24, ahead=ahead)
        search = Search(file, SPACE, settings)
        search.run(target, self.evaluate, shielded=self.shielded, told=lambda _: None)
        return search.finished()


@pytest.mark.parametrize(
    "points", [(0, 1, 2, 5), pytest.param((3, 4, 6, 7, 8, 13, 21), marks=pytest.mark.full("kills"))]
)
@pytest.mark.parametrize(("batch", "ahead"), [(1, 0), (4, 0), (4, 1), (3, 2)])
def test_crashes_at_every_point_leave_the_trials_of_an_uninterrupted_search(
    tmp_path: Path, batch: int, ahead: int, points: tuple[int, ...]
) -> None:
    whole = Runs().run(tmp_path / "whole.db", 14, batch, ahead)
    assert [trial.number for trial in whole] == list(range(14))
    crashes = 0
    # Every restart crashes as well, at an ever later point, until one completes.
    for first in points:
        file, point = tmp_path / f"{first}.db", first
        while True:
            try:
                trials = Runs(crash_at=point).run(file, 14, batch, ahead)
                break
            except Crash:
                crashes += 1
                point += 3
        assert trials == whole
        assert read_trials(file) == whole
    assert crashes > 10


def spread(params: dict) -> TrialScores:
    """The stand-in's scores with more KL of a kind that lowers no refusals, so that many trials are beaten."""
    found = score(params)
    return found if found.reason else found.model_copy(update={"kl": found.kl + 0.05 * params["mlp.max_weight"]})


def raced(plan: Plan, params: dict) -> TrialScores:
    """The same; the last prompts, two of them refused, are not answered where a rival beats the others."""
    full = spread(params)
    seen = full.refusals - 2
    if full.reason is not None or not any(count <= seen and kl <= full.kl for count, kl in plan.rivals):
        return full
    return full.model_copy(update={"refusals": seen, "projected_from": 90})


@pytest.mark.parametrize("ahead", [0, 1])
def test_plans_say_what_their_trials_race_with(tmp_path: Path, ahead: int) -> None:
    asked: dict[int, Plan] = {}

    class Racing(Runs):
        def evaluate(self, plans: Sequence[Plan]) -> Sequence[TrialScores]:
            self.point()
            asked.update({plan.first: plan for plan in plans})
            return [raced(plans[0], params) for params in plans[0].parameters]

        def run(self, file: Path, target: int, batch: int, ahead: int = 0) -> list[Trial]:
            settings = StudySettings(
                seed=3, startup_trials=6, batch=batch, rows=8, ei_candidates=24, ahead=ahead, racing=True
            )
            search = Search(file, SPACE, settings)
            search.run(target, self.evaluate, shielded=self.shielded, told=lambda _: None)
            return search.finished()

    whole = Racing().run(tmp_path / "whole.db", 24, 4, ahead)
    assert sum(bool(trial.values.projected_from) for trial in whole) > 2
    for first, plan in asked.items():
        known = whole[: max(0, first - 4 * ahead)]
        assert list(plan.rivals) == [(one.values.unanswered, one.values.kl) for one in pareto_front(known)]
    # What was dropped would not have been on the front.
    complete = [trial.model_copy(update={"values": spread(trial.params)}) for trial in whole]
    assert pareto_front(whole) == pareto_front(complete)
    assert read_trials(tmp_path / "whole.db") == whole
    for point in (1, 6, 13):
        file, left = tmp_path / f"{point}.db", point
        while True:
            try:
                trials = Racing(crash_at=left).run(file, 24, 4, ahead)
                break
            except Crash:
                left += 9
        assert trials == whole


@pytest.mark.parametrize("names", [("soft", "refusals", "kl"), ("soft",), ("soft", "kl")])
def test_a_study_has_any_objectives_and_reads_them_back(tmp_path: Path, names: tuple[str, ...]) -> None:
    class Evading(Runs):
        def evaluate(self, plans: Sequence[Plan]) -> Sequence[TrialScores]:
            found = super().evaluate(plans)
            soft = [round(40 * params["mlp.max_weight"] / 1.5) for params in plans[0].parameters]
            return [
                one.model_copy(
                    update={
                        "objectives": names,
                        "others": {"soft": ObjectiveScore(figure=count, of=80, smooth=0.25, direction="more")},
                    }
                )
                for one, count in zip(found, soft, strict=True)
            ]

    def search(file: Path, crash_at: int | None = None) -> list[Trial]:
        runs = Evading(crash_at)
        settings = StudySettings(seed=3, startup_trials=6, batch=4, rows=8, ei_candidates=24, objectives=names)
        found = Search(file, SPACE, settings)
        found.run(14, runs.evaluate, shielded=runs.shielded, told=lambda _: None)
        return found.finished()

    whole = search(tmp_path / "whole.db")
    assert all(trial.values.objectives == names for trial in whole)
    with pytest.raises(Crash):
        search(tmp_path / "half.db", 9)
    assert search(tmp_path / "half.db") == whole == read_trials(tmp_path / "half.db")
    stored = optuna.load_study(study_name="abliterate", storage=file_url(tmp_path / "half.db"))
    assert stored.metric_names == list(names)
    place = names.index("soft")
    assert [trial.values[place] for trial in stored.trials] == [80 - t.values.others["soft"].figure for t in whole]


def test_trials_are_stored_as_optuna_stores_them_all_or_none(tmp_path: Path) -> None:
    distributions = SPACE.distributions()
    asked = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    attributes = ({"opening": 0.1 + 0.2, "reason": None}, {"opening": math.inf, "reason": "ünfit", "skipped": True})
    trials = [
        create_trial(values=values, params=asked.ask(distributions).params, distributions=distributions, user_attrs=own)
        for values, own in zip(([3.0, 1 / 3], [100.0, math.inf]), attributes, strict=True)
    ]
    for number, trial in enumerate(trials):
        trial.number = number
    by_optuna, by_us = (open_study(file_url(tmp_path / name), "a") for name in ("optuna.db", "ours.db"))
    by_optuna.add_trials(trials)
    add_trials(by_us, trials)
    found = by_us.get_trials()
    for ours, theirs in zip(found, by_optuna.get_trials(), strict=True):
        assert ours == theirs
    assert [trial.distributions for trial in found] == [distributions] * 2
    with pytest.raises(Exception, match="JSON"):
        add_trials(by_us, [trials[0], create_trial(values=[1.0, 1.0], user_attrs={"opening": object()})])
    assert open_study(file_url(tmp_path / "ours.db"), "a").get_trials() == found
    by_us.add_trial(trials[0])
    assert [trial.number for trial in by_us.get_trials()] == [0, 1, 2]


def test_half_a_batch_that_a_former_version_stored_is_completed(tmp_path: Path) -> None:
    whole = Runs().run(tmp_path / "whole.db", 8, 4)
    with pytest.raises(Crash):
        Runs(crash_at=6).run(tmp_path / "half.db", 8, 4)
    half = open_study(file_url(tmp_path / "half.db"), "abliterate")
    assert (len(half.trials), half.user_attrs["plan"][0]["first"]) == (4, 4)
    add_trials(half, optuna.load_study(study_name="abliterate", storage=file_url(tmp_path / "whole.db")).trials[4:6])
    assert Runs().run(tmp_path / "half.db", 8, 4) == whole


@pytest.mark.parametrize("ahead", [0, 1])
def test_a_search_extended_later_is_the_one_that_was_not(tmp_path: Path, ahead: int) -> None:
    whole = Runs().run(tmp_path / "whole.db", 15, 4, ahead)
    for target in (6, 12, 13, 5, 15):
        found = Runs().run(tmp_path / "a.db", target, 4, ahead)
        assert found == whole[: len(found)]
    assert found == whole


def test_what_is_asked_ahead_does_not_know_the_batch_before(tmp_path: Path) -> None:
    runs = Runs()
    ahead, plain = runs.run(tmp_path / "ahead.db", 24, 4, 1), Runs().run(tmp_path / "plain.db", 24, 4)
    assert runs.waiting == 0  # no batch follows the last one
    # Start-up trials are random, and the first batch after them knows the required number of results.
    same = next(index for index, (one, other) in enumerate(zip(ahead, plain, strict=True)) if one != other)
    assert same == 8


def test_k_belongs_to_the_job_and_the_seed_decides(tmp_path: Path) -> None:
    assert Runs().run(tmp_path / "a.db", 10, 4) == Runs().run(tmp_path / "b.db", 10, 4)
    settings = StudySettings(seed=4, startup_trials=6, batch=4, rows=8, ei_candidates=24)
    other = Search(tmp_path / "c.db", SPACE, settings)
    other.run(10, Runs().evaluate, shielded=contextlib.nullcontext, told=lambda _: None)
    assert other.finished() != read_trials(tmp_path / "a.db")


def test_no_trial_is_ever_running_in_the_database(tmp_path: Path) -> None:
    with pytest.raises(Crash):
        Runs(crash_at=9).run(tmp_path / "a.db", 14, 4)
    study = optuna.load_study(study_name="abliterate", storage=f"sqlite:///{tmp_path / 'a.db'}")
    assert all(trial.state.is_finished() for trial in study.get_trials())


def test_the_spaces_have_their_ranges() -> None:
    field, wide = (SearchSpace(name, 11).distributions() for name in ("field", "wide"))
    assert (field["direction_index"].low, field["direction_index"].high) == (4.0, 9.0)
    assert (field["attention.max_weight"].low, field["attention.max_weight"].high) == (0.8, 1.5)
    assert (field["mlp.max_weight"].low, field["mlp.max_weight"].high) == (-0.25, 1.5)
    assert (field["mlp.min_weight_distance"].low, field["mlp.min_weight_distance"].high) == (1.0, 6.0)
    assert (wide["direction_index"].low, wide["direction_index"].high) == (2.0, 10.0)
    params = {**dict.fromkeys(field, 0.5), "direction_scope": "per layer", "mlp.max_weight": -0.2}
    edit = SearchSpace("field", 11).edit(params)
    assert edit.direction_index is None
    assert edit.kernels["mlp"].max_weight == 0
    assert edit.kernels["attention"].min_weight == 0.25


@pytest.mark.parametrize("layers", [1, 2])
def test_the_spaces_bear_very_shallow_models(layers: int) -> None:
    for name in ("field", "wide"):
        for distribution in SearchSpace(name, layers).distributions().values():
            assert getattr(distribution, "low", 0) <= getattr(distribution, "high", 0)


def test_known_points_ablate_one_direction_in_full_from_all_layers() -> None:
    points = SearchSpace("wide", 8, directions=3).known_points()
    edits = [SearchSpace("wide", 8).edit(point) for point in points]
    indices = [edit.direction_index for edit in edits]
    assert indices == [pytest.approx(7 * d) if d else None for d in (0.4, 0.6, None, 0.5, 0.3, 0.7, None, 0.8)]
    for number, edit in enumerate(edits):
        assert edit.strengths == (1.0, 0.0, 0.0)
        for kernel in map(vars, edit.kernels.values()):
            shape = WeightKernel(**kernel)
            if number == 6:
                assert [shape.strength(layer) for layer in (3, 4)] == [pytest.approx(1 - 0.5 / 7)] * 2
                assert shape.strength(0) == shape.strength(7) == pytest.approx(0.5)
            else:
                assert [shape.strength(layer) for layer in range(8)] == [1.0] * 8


@pytest.mark.parametrize("name", ["wide", "field"])
@pytest.mark.parametrize("layers", [1, 2, 3, 8, 64])
def test_known_points_lie_in_the_space_and_differ(name: str, layers: int) -> None:
    space = SearchSpace(name, layers, directions=2)
    points = space.known_points()
    for point in points:
        assert point.keys() == space.distributions().keys()
        for parameter, range_ in space.distributions().items():
            assert range_._contains(range_.to_internal_repr(point[parameter]))
    assert len({tuple(point.values()) for point in points}) == len(points) >= 2


def test_a_search_begins_with_the_known_points_unless_told_not_to(tmp_path: Path) -> None:
    settings = StudySettings(seed=3, startup_trials=10, batch=3, rows=8, ei_candidates=24)
    found = {}
    for seed, known in ((3, True), (4, True), (3, False)):
        search = Search(tmp_path / f"{seed}-{known}.db", SPACE, replace(settings, seed=seed, known_points=known))
        search.run(10, Runs().evaluate, told=lambda _: None)
        found[seed, known] = [trial.params for trial in search.finished()]
    assert found[3, True][:8] == found[4, True][:8] == SPACE.known_points()
    assert not any(params in found[3, False] for params in SPACE.known_points())
    # The random ones after them are those of a search without known points.
    assert found[3, True][8:] == found[3, False][8:]
    assert found[3, True][8:] != found[4, True][8:]


def trial(number: int, refusals: int, kl: float, reason: str | None = None) -> Trial:
    return Trial(number=number, params={}, values=TrialScores(refusals=refusals, kl=kl, reason=reason))


def test_front_and_choice() -> None:
    trials = [
        trial(0, 50, 0.01), trial(1, 3, 0.2), trial(2, 5, 0.1), trial(3, 5, 0.1), trial(4, 6, 0.05),
        trial(5, 3, 0.3), trial(6, 0, 100.0, "planted"), trial(7, 60, 0.02),
    ]  # fmt: skip
    assert [t.number for t in pareto_front(trials)] == [1, 2, 4, 0]
    assert choose(trials, 100, 0.02).number == 2
    assert choose(trials, 100, 0.0).number == 1
    assert choose(trials, 100, 0.03).number == 4
    with pytest.raises(JobError, match="every trial failed"):
        choose(trials[6:7], 100, 0.02)


def test_trials_that_did_not_answer_are_ordered_behind_all_that_did(tmp_path: Path) -> None:
    """A measured value dominates a missing one; among missing ones, the smaller KL divergence dominates."""

    def evaluate(plans: Sequence[Plan]) -> Sequence[TrialScores]:
        found = [score(params) for params in plans[0].parameters]
        return [
            TrialScores(refusals=100, kl=one.kl, reason="no answers were generated", skipped=True)
            if one.reason is None and one.kl > 0.01
            else one.model_copy(update={"opening": 30.0})
            for one in found
        ]

    settings = StudySettings(seed=3, startup_trials=6, batch=4, rows=8, ei_candidates=24)
    search = Search(tmp_path / "a.db", SPACE, settings)
    search.run(16, evaluate, told=lambda _: None)
    trials = read_trials(tmp_path / "a.db")
    assert trials == search.finished()
    skipped = [trial for trial in trials if trial.values.skipped]
    measured = [trial for trial in trials if trial.values.reason is None]
    assert skipped
    assert measured
    assert not {trial.number for trial in pareto_front(trials)} & {trial.number for trial in skipped}
    seen = [search._sampled(trial.values) for trial in search.finished()]
    for answered in measured:
        for other in skipped:
            assert all(a <= b for a, b in zip(seen[answered.number], seen[other.number], strict=True))
    assert len({seen[trial.number][0] for trial in skipped}) == 1
    with sqlite3.connect(tmp_path / "a.db") as db:
        marked = db.execute("SELECT COUNT(*) FROM trial_user_attributes WHERE key = 'skipped'").fetchone()
    db.close()
    assert marked == (len(skipped),)


def test_a_damaged_study_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "study.db").write_bytes(b"not a database" * 1000)
    with pytest.raises(JobError, match="cannot be opened"):
        read_trials(tmp_path / "study.db")


def test_the_search_loads_no_torch() -> None:
    modules = "job.search.optimizer, job.report.status, job.report.markdown, job.pipeline, job.lifecycle.start"
    code = f"import sys, {modules}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
