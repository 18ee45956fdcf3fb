"""The Pareto front and the choice with more objectives than refusals and KL."""

from __future__ import annotations

from job.records import ObjectiveScore, Trial, TrialScores
from job.search.choice import Choice
from job.search.pareto import choose, eligible, pareto_front


def trial(number: int, refusals: int, soft: int, kl: float, **other: object) -> Trial:
    score = ObjectiveScore.model_validate({"figure": soft, "of": 40, **other})
    names = ("refusals", "soft", "kl")
    values = TrialScores(refusals=refusals, kl=kl, objectives=names, others={"soft": score})
    return Trial(number=number, params={}, values=values)


def test_the_front_has_all_objectives() -> None:
    evading, honest, both = trial(0, 0, 30, 0.01), trial(1, 0, 2, 0.2), trial(2, 20, 2, 0.02)
    worse = trial(3, 20, 30, 0.3)
    assert [one.number for one in pareto_front([worse, both, honest, evading])] == [1, 0, 2]
    # With two objectives the evading one would leave neither of the others.
    plain = [
        one.model_copy(update={"values": TrialScores(refusals=one.values.refusals, kl=one.values.kl)})
        for one in (evading, honest, both)
    ]
    assert [one.number for one in pareto_front(plain)] == [0]
    assert choose([worse, both, honest, evading], 100, 0.02).number == 1
    assert choose(plain, 100, 0.02).number == 0


def test_counts_over_other_numbers_of_prompts_weigh_the_same() -> None:
    # 10 of 100 refusals and 4 of 40 evasions are a tenth each.
    assert trial(0, 10, 4, 0.1).values.faults(100) == 20
    assert trial(0, 10, 4, 0.1).values.costs == (10, 4, 0.1)
    assert [one.number for one in eligible([trial(0, 1, 0, 0.5), trial(1, 2, 0, 0.1)], 100, 0.02)] == [0, 1]


def test_more_of_a_thing_is_better_where_more_is_asked_for() -> None:
    some, many = trial(0, 0, 5, 0.1, direction="more"), trial(1, 0, 39, 0.1, direction="more")
    assert [one.number for one in pareto_front([some, many])] == [1]
    assert many.values.costs == (0, 1, 0.1)
    assert str(many.values.others["soft"]) == "39/40"


def test_finalists_are_those_with_the_fewest_faults_in_all_that_counts() -> None:
    trials = [trial(0, 0, 30, 0.01), trial(1, 0, 2, 0.2), trial(2, 20, 2, 0.02), trial(3, 0, 3, 0.1)]
    found = Choice(by_bounds=True, tolerance=0.02, searched=(40, 1)).candidates(trials)
    assert [one.number for one in found] == [1, 3]
    # The first on the front, by its first objective, has not the fewest.
    found = Choice(by_bounds=True, tolerance=0.02, searched=(40, 1)).candidates(
        [trial(0, 0, 30, 0.01), trial(1, 1, 1, 0.2)]
    )
    assert [one.number for one in found] == [1]
