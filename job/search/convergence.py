"""Whether a search has converged and its result is plausible; needs no torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from job.numerics.statistics import wilson_interval
from job.records import DEFAULT_OBJECTIVES, Figures, Trial
from job.text.behaviour import REFUSAL_WORDS, BehaviourWords

# A search has not converged if its last third added more than this share of the front's hypervolume.
MOST_GAIN = 0.02
# An edit is complete if at most this share of the prompts is unanswered.
_COMPLETE = 0.02
# Fewer trials permit no conclusion.
LEAST_TRIALS = 6


def hypervolume(points: Iterable[tuple[float, float]]) -> float:
    """Return the hypervolume of points (share unanswered, KL), with reference (1, 1); a larger KL counts as 1."""
    area, least = 0.0, 1.0
    for share, kl in sorted(points):
        if kl < least:
            area += (1 - share) * (least - kl)
            least = kl
    return area


def search_warnings(
    trials: Sequence[Trial],
    prompts: int,
    words: BehaviourWords = REFUSAL_WORDS,
    compared: Sequence[Trial] | None = None,
) -> list[str]:
    """Return warnings about a search's front, [] if it is too short.

    `prompts` is the number of bad prompts; `compared` are the trials that the front is drawn from, None for all.
    """
    usable = [trial for trial in (trials if compared is None else compared) if trial.values.reason is None]
    if len(trials) < LEAST_TRIALS or not usable:
        return []
    counts = {trial.values.faults(prompts) for trial in usable}
    if len(counts) == 1 and max(counts) > _COMPLETE * prompts:
        left = "prompts unanswered" if words.refuses else f"responses {words.shown} or broken"
        if usable[0].values.objectives != DEFAULT_OBJECTIVES:
            left = "prompts not as wanted"
        return [
            f"the front is flat: every edit leaves {counts.pop():g} of {prompts} {left}; "
            "the direction may not mediate the behaviour, or the markers may not detect it"
        ]
    before, after = (hypervolume(_points(found, prompts)) for found in (_before_last_third(trials, usable), usable))
    if after - before > MOST_GAIN * after:
        return [
            f"the search has not converged: its last third added {100 * (1 - before / after):.0f} % of the area that "
            "its front dominates; more trials are likely to find better edits (`abliterate resume --trials N`)"
        ]
    return []


def effect_warnings(base: Figures, edited: Figures, words: BehaviourWords = REFUSAL_WORDS) -> list[str]:
    """Return warnings about the chosen edit's effect, from metrics on the report split."""
    found = []
    before, after = (wilson_interval(one.failed, one.bad_prompts) for one in (base, edited))
    if after[1] >= before[0]:
        went = "went unanswered" if words.refuses else f"had a response {words.shown} or a broken one"
        found.append(
            f"the edit has no effect that differs from chance: {base.failed} of {base.bad_prompts} prompts "
            f"with the behaviour {went} before, {edited.failed} of {edited.bad_prompts} after"
        )
    total = edited.bad_prompts + edited.good_prompts
    broken = edited.degenerate + edited.false_degenerate
    normal = wilson_interval(base.degenerate + base.false_degenerate, base.bad_prompts + base.good_prompts)[1]
    if wilson_interval(broken, total)[0] > normal:
        found.append(f"the edited model is damaged: {broken} of {total} responses are broken")
    return found


def _before_last_third(trials: Sequence[Trial], usable: Sequence[Trial]) -> list[Trial]:
    early = {trial.number for trial in trials[: len(trials) * 2 // 3]}
    return [trial for trial in usable if trial.number in early]


def _points(trials: Iterable[Trial], prompts: int) -> list[tuple[float, float]]:
    return [(min(trial.values.faults(prompts) / prompts, 1.0), min(trial.values.kl, 1.0)) for trial in trials]
