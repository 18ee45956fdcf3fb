"""Detectors judge the report's responses side by side, so that none must be trusted alone.

A detector is a `Scorer`. A package adds one under an entry point of the group `abliteration_job.scorers` that names a
`Factory`; the entry point's name in `scoring.detectors` enables it:

    [project.entry-points."abliteration_job.scorers"]
    polite = "my_package:make_scorer"
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Literal, Protocol, get_args

from job.config.scorers import SCORERS_GROUP
from job.config.sections import LoadingSettings, ScoringSettings
from job.errors import first_line
from job.records import Agreement, DetectorCounts, DetectorReport
from job.scoring.broken import Exchange
from job.scoring.soft_refusals import is_evasion
from job.text.refusal_markers import RefusalMarkers

Label = Literal["answered", "refused", "broken"]


class Scorer(Protocol):
    """Labels responses."""

    def __call__(self, exchanges: Sequence[Exchange], /) -> Sequence[Label]:
        """Return a label for each exchange; if it raises, the report omits this detector."""


@dataclass(frozen=True)
class Context:
    """Settings, the job's refusal markers and progress callback for a scorer."""

    scoring: ScoringSettings
    markers: RefusalMarkers
    loading: LoadingSettings
    say: Callable[[str], None]


Factory = Callable[[Context], Scorer]


def _refused(is_refusal: Callable[[Exchange], bool]) -> Scorer:
    return lambda exchanges: ["refused" if is_refusal(one) else "answered" for one in exchanges]


def _markers(context: Context) -> Scorer:
    return _refused(lambda one: context.markers.for_prompt(one.prompt).is_refusal(one.answer))


def _soft(context: Context) -> Scorer:
    return _refused(lambda one: context.markers.for_prompt(one.prompt).is_refusal(one.answer) or is_evasion(one.answer))


def _degenerate(_: Context) -> Scorer:
    return lambda exchanges: ["broken" if one.broken else "answered" for one in exchanges]


def _nli(context: Context) -> Scorer:
    from job.scoring.nli import Entailment  # torch takes seconds to load

    assert context.scoring.nli_model is not None
    refused = Entailment.loaded(context.scoring.nli_model, context.loading, context.say).refused

    def score(exchanges: Sequence[Exchange]) -> list[Label]:
        return ["refused" if refusal else "answered" for refusal in refused([one.answer for one in exchanges])]

    return score


_BUILTIN: Mapping[str, Factory] = {"markers": _markers, "soft": _soft, "degenerate": _degenerate, "nli": _nli}


def make_scorer(name: str, context: Context) -> Scorer:
    """Return the detector of that name; LookupError if no installed package provides it, or its factory's error."""
    if name in _BUILTIN:
        return _BUILTIN[name](context)
    entry_points = metadata.entry_points(group=SCORERS_GROUP, name=name)
    if not entry_points:
        raise LookupError("no installed package provides it")
    factory: Factory = next(iter(entry_points)).load()
    return factory(context)


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
    labels = list(scorer(exchanges))
    if len(labels) != len(exchanges):
        raise ValueError(f"it returned {len(labels)} labels for {len(exchanges)} responses")
    for label in labels:
        if label not in get_args(Label):
            raise ValueError(f"{label!r} is not one of the labels {', '.join(get_args(Label))}")
    return labels


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
