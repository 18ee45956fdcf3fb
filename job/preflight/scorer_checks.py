"""Checks of scorers that need something from elsewhere: a model, an endpoint, an installed package."""

from __future__ import annotations

from pathlib import Path

from job.config.schema import Settings
from job.config.scorers import BUILTIN_SCORERS, judging
from job.errors import ImpossibleJobError, JobError, in_one_line
from job.preflight.checks import Check, attempt
from job.preflight.inputs import PreflightInputs
from job.scoring.broken import Exchange
from job.scoring.detectors import scorer_factory

_NEED_SOMETHING = ("nli", "classifier", "judge")
# What a judge is asked, to see whether it answers with a number.
_HARMLESS = Exchange("What is the capital of France?", "The capital of France is Paris.")


def scorer_checks(inputs: PreflightInputs, cache: Path | None) -> list[Check]:
    """Return a check of each scorer that needs something from elsewhere; none for another machine.

    A scorer that cannot be used stops the job only as an objective: reports leave out detectors that fail. `cache` is
    the folder for descriptive files, None for the usual one. Raises UsageError for an objective with wrong settings.
    """
    if inputs.on is not None:
        return []
    objectives = {one.scorer for one in judging(inputs.settings.search.objectives)}
    used = dict.fromkeys([*sorted(objectives), *inputs.settings.scoring.detectors])
    return [
        _objective_check(scorer, inputs, cache) if scorer in objectives else _detector_check(scorer, inputs, cache)
        for scorer in used
        if scorer in _NEED_SOMETHING or scorer not in BUILTIN_SCORERS
    ]


def _objective_check(scorer: str, inputs: PreflightInputs, cache: Path | None) -> Check:
    found = attempt(_name(scorer), lambda: _examined(scorer, inputs, cache))
    return found if isinstance(found, Check) else _usable(scorer, found)


def _detector_check(scorer: str, inputs: PreflightInputs, cache: Path | None) -> Check:
    try:
        return _usable(scorer, _examined(scorer, inputs, cache))
    except JobError as error:
        return Check(
            name=_name(scorer),
            status="warn",
            measured=f"the report will lack the detector {scorer}: {error}",
            needed="a scorer that can be used",
            remedy=error.remedy,
        )


def _usable(scorer: str, measured: str) -> Check:
    return Check(name=_name(scorer), status="ok", measured=measured, needed="a scorer that can be used")


def _name(scorer: str) -> str:
    return f"scorer.{scorer}" if scorer in BUILTIN_SCORERS else "scorer"


def _examined(scorer: str, inputs: PreflightInputs, cache: Path | None) -> str:
    """Return what a scorer was found to be. Raises JobError if it cannot be used."""
    if scorer == "judge":
        return _judged(inputs.settings, inputs)
    if scorer in BUILTIN_SCORERS:
        return _classifying(scorer, inputs, cache)
    try:
        scorer_factory(scorer)
    except Exception as error:  # importing others' code may raise anything
        raise ImpossibleJobError(
            f"the scorer {scorer} cannot be used: {in_one_line(error)}",
            remedy="correct it, or choose another objective",
        ) from error
    return f"{scorer} is installed"


def _judged(settings: Settings, inputs: PreflightInputs) -> str:
    from job.scoring.judge import Judge

    judge = Judge.opened(settings.judge, settings.card.behaviour, None, inputs.report)
    (degree,) = judge([_HARMLESS])
    return f"{settings.judge.model} answers: {degree:.1f} for a harmless response"


def _classifying(scorer: str, inputs: PreflightInputs, cache: Path | None) -> str:
    from job.scoring.classifier import counted_labels, labels_before_download
    from job.scoring.nli import entailment_labels

    scoring = inputs.settings.scoring
    name, setting = (
        (scoring.nli_model, "scoring.nli_model") if scorer == "nli" else (scoring.classifier, "scoring.classifier")
    )
    assert name is not None
    labels = labels_before_download(name, setting, inputs.report, cache)
    if scorer == "nli":
        entailment_labels(name, labels)
    else:
        counted_labels(name, labels, scoring.classifier_labels)
    return f"{name} has the labels {', '.join(labels)}"
