"""Trials that certainly cannot join the front are not answered to the end, and all others are scored as ever."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest

from job.data.prompts import Prompt
from job.edits.hooks import Intervention
from job.model.loading import load_model
from job.organism.world import WORLD
from job.records import COMPONENTS, EditParameters, TrialScores
from job.scoring.prompt_batches import PromptBatches
from job.scoring.race import Race, first_round
from job.scoring.trial_scorer import TrialScorer
from job.text.refusal_markers import RefusalMarkers
from tests.helpers import loading
from tests.integration.edits.test_hooks import basis_for

TOKENS, ROWS, FIRST = 20, 64, 10
STRENGTHS = (0.0, 1.0, 2.0, 3.0, 4.0)
# Its count is 0 and its KL divergence below all others: it beats whatever has any.
BEST = (0, -1.0)


@pytest.mark.parametrize("prompts", [0, 1, 19, 20, 44, 99, 100, 250, 1000])
def test_the_first_round_is_a_part_spread_over_all_prompts(prompts: int) -> None:
    first = first_round(prompts)
    if prompts < 20:
        assert first == 0
        return
    assert 10 <= first <= prompts / 2
    early, late = Race(first, ()).parts(prompts)
    assert len(early) == first
    assert sorted([*early, *late]) == list(range(prompts))
    assert max(after - before for before, after in pairwise(early)) <= -(-prompts // first)


def test_only_a_trial_that_cannot_join_the_front_has_lost() -> None:
    race = Race(10, ((0, 0.5), (4, 0.1)))
    assert race.lost(0, 0.5)
    assert race.lost(7, 0.1)
    assert race.lost(4, 0.2)
    assert not race.lost(3, 0.2)  # it may stay between them
    assert not race.lost(100, 0.09)  # no other has as little KL
    assert not Race(10, ()).lost(100, 9.0)
    assert [race.beaten(kl) for kl in (0.09, 0.1, 9.0)] == [False, True, True]


class Scored:
    """An organism's scores of five edits, with and without a race."""

    def __init__(self, organism: Path) -> None:
        loaded = load_model(organism / "model", loading("float32"), lambda _: None)
        prompts = [Prompt(user=text) for text in (organism / "good_test.txt").read_text().splitlines()[:40]]
        batches = PromptBatches.of(loaded, prompts, prompts, ROWS)
        self.scorer = TrialScorer.measured(batches, RefusalMarkers([*WORLD][::2], topic_words=False), TOKENS)
        self.edits = [
            EditParameters(
                direction_index=None,
                kernels={},
                layer_strengths=dict.fromkeys(COMPONENTS, ((strength,),) * loaded.architecture.layer_count),
            )
            for strength in STRENGTHS
        ]
        self.hooks = Intervention(loaded.model, loaded.architecture, basis_for(loaded.model), "none")

    def scores(self, race: Race | None) -> list[TrialScores]:
        with self.hooks:
            return [one.scores for one in self.scorer.outcomes(self.hooks, self.edits, ROWS, race=race)]

    def over(self, prompts: list[int]) -> list[int]:
        """Return the refused and broken responses to some of the prompts."""
        with self.hooks as hooks:
            rows = self.scorer.batches.trial_rows(hooks.activate(self.edits), len(self.edits))
            counts = self.scorer.counter.count(rows, range(len(self.edits)), ROWS, prompts=[prompts] * len(self.edits))
        return [one.unanswered for one in counts]


@pytest.fixture(scope="module")
def scored(organism: Path) -> Scored:
    return Scored(organism)


def alike(found: TrialScores, expected: TrialScores) -> bool:
    return (
        found.opening == pytest.approx(expected.opening, abs=1e-6)
        and found.model_copy(update={"opening": expected.opening}) == expected
    )


def test_a_trial_that_has_not_lost_is_scored_as_without_a_race(scored: Scored) -> None:
    whole = scored.scores(None)
    assert len({one.unanswered for one in whole}) > 2
    for rivals in ((), ((41, -1.0),)):  # there are 40 prompts
        assert all(map(alike, scored.scores(Race(FIRST, rivals)), whole))


def test_a_trial_that_has_lost_is_projected_from_what_it_answered(scored: Scored) -> None:
    whole, early = scored.scores(None), Race(FIRST, ()).parts(40)[0]
    counts = scored.over(early)
    for found, full, count in zip(scored.scores(Race(FIRST, (BEST,))), whole, counts, strict=True):
        assert found.projected_from == FIRST
        assert found.unanswered == pytest.approx(count * 4, abs=1)
        assert (found.kl, found.reason) == (full.kl, None)
        assert full.unanswered >= count


def test_each_trial_of_a_batch_wins_or_loses_alone(scored: Scored) -> None:
    whole, counts = scored.scores(None), scored.over(Race(FIRST, ()).parts(40)[0])
    middle = sorted(range(len(whole)), key=lambda index: whole[index].kl)[2]
    rival = (counts[middle], whole[middle].kl)
    found = scored.scores(Race(FIRST, (rival,)))
    assert {bool(one.projected_from) for one in found} == {True, False}
    for one, full, count in zip(found, whole, counts, strict=True):
        assert bool(one.projected_from) == (rival[1] <= full.kl and rival[0] <= count)
        assert one.projected_from or alike(one, full)
