"""Scorers judge responses: as detectors side by side in the report, and as objectives of the search.

A package adds a `Scorer` under an entry point of the group `abliteration_job.scorers` that names a `Factory`; the entry
point's name in `scoring.detectors` or `search.objectives` enables it (docs/scorers.md):

    [project.entry-points."abliteration_job.scorers"]
    polite = "my_package:make_scorer"
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Literal, Protocol, get_args

from job.config.scorers import PATTERN, SCORERS_GROUP
from job.config.sections import JudgeSettings, LoadingSettings, ScoringSettings
from job.errors import first_line
from job.records import Agreement, DetectorCounts, DetectorReport
from job.scoring.broken import Exchange
from job.scoring.soft_refusals import is_evasion
from job.text.patterns import compiled, count_matches
from job.text.refusal_markers import RefusalMarkers

Label = Literal["answered", "refused", "broken"]
# A label, or how much of what the scorer looks for a response has, from 0 to 1; it counts from `COUNTS` on.
Judgement = Label | float
COUNTS = 0.5


class Scorer(Protocol):
    """Judges responses."""

    def __call__(self, exchanges: Sequence[Exchange], /) -> Sequence[Judgement]:
        """Return a judgement of each exchange, which must depend on nothing else.

        If it raises, the report omits this detector, and a search with this objective ends.
        """


@dataclass(frozen=True)
class Context:
    """What a scorer is made from.

    Attributes:
        markers: The job's refusal markers.
        say: Receives messages for the user.
        judge: The judge endpoint; None: as by default, without one.
        behaviour: The behaviour to remove, in a few words.
        cache: File of a run folder that keeps a judge's answers; None: they are not kept.
        commits: Pinned commits of scorers' models on the Hub, by scorer.
    """

    scoring: ScoringSettings
    markers: RefusalMarkers
    loading: LoadingSettings
    say: Callable[[str], None]
    judge: JudgeSettings | None = None
    behaviour: str = ""
    cache: Path | None = None
    commits: Mapping[str, str] = field(default_factory=dict)


Factory = Callable[[Context], Scorer]


def _refused(is_refusal: Callable[[Exchange], bool]) -> Scorer:
    return lambda exchanges: ["refused" if is_refusal(one) else "answered" for one in exchanges]


def _markers(context: Context) -> Scorer:
    return _refused(lambda one: context.markers.for_prompt(one.prompt).is_refusal(one.answer))


def _soft(context: Context) -> Scorer:
    def is_soft(one: Exchange) -> bool:
        refused = context.markers.for_prompt(one.prompt).is_refusal(one.answer)
        return refused or is_evasion(one.prompt, one.answer)

    return _refused(is_soft)


def _degenerate(_: Context) -> Scorer:
    return lambda exchanges: ["broken" if one.broken else "answered" for one in exchanges]


def _nli(context: Context) -> Scorer:
    from job.scoring.nli import Entailment  # torch takes seconds to load

    assert context.scoring.nli_model is not None
    model, commit = context.scoring.nli_model, context.commits.get("nli")
    entailment = Entailment.loaded(model, context.loading, context.say, commit)
    return lambda exchanges: entailment.shares([one.answer for one in exchanges])


def _classifier(context: Context) -> Scorer:
    from job.scoring.classifier import TextClassifier  # torch takes seconds to load

    assert context.scoring.classifier is not None
    name, commit = context.scoring.classifier, context.commits.get("classifier")
    classifier = TextClassifier.loaded(name, "scoring.classifier", context.loading, context.say, commit)
    wanted = classifier.numbers(context.scoring.classifier_labels)
    return lambda exchanges: classifier.shares([one.answer for one in exchanges], wanted)


def _found(setting: str, pattern: re.Pattern[str]) -> Scorer:
    def degrees(exchanges: Sequence[Exchange]) -> list[Judgement]:
        counts = [count_matches(setting, pattern, one.answer) for one in exchanges]
        # One match counts, and each further one less: 0, 1/2, 2/3, 3/4.
        return [count / (count + 1) for count in counts]

    return degrees


def _words(context: Context) -> Scorer:
    words = sorted(context.scoring.words, key=len, reverse=True)
    alternatives = "|".join(r"\s+".join(map(re.escape, word.split())) for word in words)
    return _found("scoring.words", re.compile(rf"(?<!\w)(?:{alternatives})(?!\w)", re.IGNORECASE))


def _pattern(context: Context) -> Scorer:
    return _found(PATTERN, compiled(PATTERN, context.scoring.pattern or r"(?!)"))


def _judge(context: Context) -> Scorer:
    from job.scoring.judge import Judge  # most jobs need no client

    assert context.judge is not None
    return Judge.opened(context.judge, context.behaviour, context.cache, context.say)


_BUILTIN: Mapping[str, Factory] = {
    "markers": _markers,
    "soft": _soft,
    "degenerate": _degenerate,
    "nli": _nli,
    "words": _words,
    "pattern": _pattern,
    "classifier": _classifier,
    "judge": _judge,
}


def scorer_factory(name: str) -> Factory:
    """Return what makes the scorer of that name; LookupError if no installed package provides it."""
    if name in _BUILTIN:
        return _BUILTIN[name]
    entry_points = metadata.entry_points(group=SCORERS_GROUP, name=name)
    if not entry_points:
        raise LookupError("no installed package provides it")
    factory: Factory = next(iter(entry_points)).load()
    return factory


def make_scorer(name: str, context: Context) -> Scorer:
    """Return the scorer of that name; LookupError if no installed package provides it, or its factory's error."""
    return scorer_factory(name)(context)


def judgements(scorer: Scorer, exchanges: Sequence[Exchange]) -> list[Judgement]:
    """Return a scorer's judgements; equal exchanges are judged once. Raises ValueError if they are none."""
    distinct = list(dict.fromkeys(exchanges))
    found = list(scorer(distinct)) if distinct else []
    if len(found) != len(distinct):
        raise ValueError(f"it returned {len(found)} judgements for {len(distinct)} responses")
    for one in found:
        # Numbers of numpy and torch are no floats by type.
        is_degree = not isinstance(one, str) and 0 <= float(one) <= 1
        if one not in get_args(Label) if isinstance(one, str) else not is_degree:
            labels = ", ".join(get_args(Label))
            raise ValueError(f"{one!r} is neither one of the labels {labels} nor a number from 0 to 1")
    of = dict(zip(distinct, found, strict=True))
    return [of[one] for one in exchanges]


def degree(judgement: Judgement) -> float:
    """Return how much of what a scorer looks for a response has, from 0 to 1."""
    if isinstance(judgement, str):
        return 0.0 if judgement == "answered" else 1.0
    return float(judgement)


def detect(
    names: Sequence[str], context: Context, base: Sequence[Exchange], edited: Sequence[Exchange], good: int
) -> DetectorReport:
    """Run detectors on both models' exchanges, good prompts first; report and skip those that fail."""
    labels: dict[str, list[Label]] = {}
    failed = {}
    for name in dict.fromkeys(names):
        try:
            labels[name] = _labels(make_scorer(name, context), [*base, *edited])
        except Exception as error:  # others' code may raise anything, and must not end the job
            failed[name] = first_line(error)
            context.say(f"warning: the detector {name} could not be used: {failed[name]}")
    counts, agreement = [], []
    for model, begin, end in (("base", 0, len(base)), ("edited", len(base), len(base) + len(edited))):
        model_labels = {name: of_both[begin:end] for name, of_both in labels.items()}
        for name, own in model_labels.items():
            counts += [_counts(name, model, "bad", own[good:]), _counts(name, model, "good", own[:good])]
        agreement += [_agreement(model, *pair) for pair in itertools.combinations(model_labels.items(), 2)]
    return DetectorReport(counts=counts, agreement=agreement, failed=failed)


def _labels(scorer: Scorer, exchanges: Sequence[Exchange]) -> list[Label]:
    return [
        one if isinstance(one, str) else "refused" if degree(one) >= COUNTS else "answered"
        for one in judgements(scorer, exchanges)
    ]


def _counts(name: str, model: str, prompts: str, labels: Sequence[Label]) -> DetectorCounts:
    return DetectorCounts.model_validate(
        {
            "detector": name,
            "model": model,
            "prompts": prompts,
            "answers": len(labels),
            "refused": labels.count("refused"),
            "broken": labels.count("broken"),
        }
    )


def _agreement(model: str, first: tuple[str, Sequence[Label]], second: tuple[str, Sequence[Label]]) -> Agreement:
    table = Counter((a != "answered", b != "answered") for a, b in zip(first[1], second[1], strict=True))
    return Agreement.model_validate(
        {
            "model": model,
            "first": first[0],
            "second": second[0],
            "both": table[True, True],
            "only_first": table[True, False],
            "only_second": table[False, True],
            "neither": table[False, False],
            "kappa": cohens_kappa(table[True, True], table[True, False], table[False, True], table[False, False]),
        }
    )


def cohens_kappa(both: int, only_first: int, only_second: int, neither: int) -> float | None:
    """Return Cohen's kappa of two binary judgements; None if chance agreement is 1, or without judgements."""
    n = both + only_first + only_second + neither
    if n == 0:
        return None
    first, second = (both + only_first) / n, (both + only_second) / n
    chance = first * second + (1 - first) * (1 - second)
    return None if chance == 1 else ((both + neither) / n - chance) / (1 - chance)
