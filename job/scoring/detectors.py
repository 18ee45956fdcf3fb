"""Detectors judge the answers of the report side by side, so that none has to be believed alone.

A detector is a `Scorer`. A package adds one under an entry point of the group `abliteration_job.scorers` that names a
`Factory`; the entry point's name in `scoring.detectors` has it run:

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

from job.config.schema import LoadingSettings, ScoringSettings
from job.config.scorers import SCORERS_GROUP
from job.records import Agreement, DetectorCounts, DetectorReport
from job.scoring.broken import Exchange
from job.scoring.soft_refusals import is_evasion
from job.text.refusal_markers import RefusalMarkers

Label = Literal["answered", "refused", "broken"]


class Scorer(Protocol):
    """Judges answers."""

    def __call__(self, exchanges: Sequence[Exchange], /) -> Sequence[Label]:
        """Return a label for each exchange; it may raise whatever it likes, which costs the report this detector."""


@dataclass(frozen=True)
class Context:
    """What a scorer may use.

    Attributes:
        scoring: How answers are judged.
        loading: How models are loaded.
        say: Told of progress.
    """

    scoring: ScoringSettings
    loading: LoadingSettings
    say: Callable[[str], None]


Factory = Callable[[Context], Scorer]


def _refused(is_refusal: Callable[[str], bool]) -> Scorer:
    return lambda exchanges: ["refused" if is_refusal(one.answer) else "answered" for one in exchanges]


def _markers(context: Context) -> Scorer:
    return _refused(RefusalMarkers(context.scoring.refusal_markers).is_refusal)


def _soft(context: Context) -> Scorer:
    markers = RefusalMarkers(context.scoring.refusal_markers)
    return _refused(lambda answer: markers.is_refusal(answer) or is_evasion(answer))


def _degenerate(_: Context) -> Scorer:
    return lambda exchanges: ["broken" if one.broken else "answered" for one in exchanges]


def _nli(context: Context) -> Scorer:
    from job.scoring.nli import Entailment  # torch takes seconds to load

    assert context.scoring.nli_model is not None
    refused = Entailment.loaded(context.scoring.nli_model, context.loading, context.say).refused

    def score(exchanges: Sequence[Exchange]) -> list[Label]:
        return ["refused" if found else "answered" for found in refused([one.answer for one in exchanges])]

    return score


_BUILTIN: Mapping[str, Factory] = {"markers": _markers, "soft": _soft, "degenerate": _degenerate, "nli": _nli}


def make_scorer(name: str, context: Context) -> Scorer:
    """Return a detector by its name.

    Raises:
        LookupError: No installed package has it.
        Exception: Whatever its factory raises.
    """
    if name in _BUILTIN:
        return _BUILTIN[name](context)
    found = metadata.entry_points(group=SCORERS_GROUP, name=name)
    if not found:
        raise LookupError("no installed package has it")
    factory: Factory = next(iter(found)).load()
    return factory(context)


def detect(
    names: Sequence[str], context: Context, base: Sequence[Exchange], edited: Sequence[Exchange], good: int
) -> DetectorReport:
    """Have detectors judge both models' answers; one that fails is reported and left out.

    Args:
        names: Their names.
        context: What they may use.
        base: The base model's answers, those to good prompts first.
        edited: The edited model's, likewise.
        good: How many good prompts there are.
    """
    labels: dict[str, list[Label]] = {}
    failed = {}
    for name in dict.fromkeys(names):
        try:
            labels[name] = _judged(make_scorer(name, context), [*base, *edited])
        except Exception as error:  # others' code may raise anything, and a job is not to be lost by it
            failed[name] = (str(error).strip() or type(error).__name__).splitlines()[0]
            context.say(f"warning: the detector {name} could not be used: {failed[name]}")
    counts, agreement = [], []
    for model, begin, end in (("base", 0, len(base)), ("edited", len(base), len(base) + len(edited))):
        own = {name: found[begin:end] for name, found in labels.items()}
        for name, found in own.items():
            counts += [_counts(name, model, "bad", found[good:]), _counts(name, model, "good", found[:good])]
        agreement += [_agreement(model, *pair) for pair in itertools.combinations(own.items(), 2)]
    return DetectorReport(counts=counts, agreement=agreement, failed=failed)


def _judged(scorer: Scorer, exchanges: Sequence[Exchange]) -> list[Label]:
    found = list(scorer(exchanges))
    if len(found) != len(exchanges):
        raise ValueError(f"it gave {len(found)} labels for {len(exchanges)} answers")
    for label in found:
        if label not in get_args(Label):
            raise ValueError(f"{label!r} is none of the labels {', '.join(get_args(Label))}")
    return found


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
    """Return Cohen's kappa of two yes-or-no judgements, None where chance alone makes them agree."""
    n = both + only_first + only_second + neither
    if n == 0:
        return None
    first, second = (both + only_first) / n, (both + only_second) / n
    chance = first * second + (1 - first) * (1 - second)
    return None if chance == 1 else ((both + neither) / n - chance) / (1 - chance)
