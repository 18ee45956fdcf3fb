"""Refuse contradictory settings."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from urllib.parse import urlsplit

from job.config.schema import _TARGET, Settings
from job.config.scorers import (
    BUILTIN_SCORERS,
    CROSS_ENTROPY,
    MEASURES,
    NEEDED,
    PATTERN,
    TASKS,
    judging,
    known_scorers,
    parse_objective,
)
from job.errors import UsageError
from job.records import DEFAULT_OBJECTIVES
from job.system.extras import require_extra
from job.text.patterns import compiled


def _refuse_contradictions(settings: Settings) -> None:
    startup, trials = settings.startup_trials, settings.trials
    if startup is not None and trials is not None and startup > trials:
        raise UsageError(
            f"startup_trials = {startup} is more than trials = {trials}",
            remedy="lower --startup-trials or raise --trials",
        )
    if settings.checkpoint is not None and not _TARGET.fullmatch(settings.checkpoint):
        raise UsageError(
            f"checkpoint {settings.checkpoint!r} is not supported",
            remedy="use s3://bucket/prefix, hf://user/repo or file:///absolute/folder",
        )
    _refuse_unknown_detectors(settings)
    _refuse_wrong_objectives(settings)
    if settings.tune and settings.batching.rows:
        raise UsageError(
            f"tune measures the best batching.rows, and batching.rows = {settings.batching.rows} is set",
            remedy="leave out one of them",
        )
    if settings.require_checkpoint and settings.checkpoint is None:
        raise UsageError("require_checkpoint is set, but checkpoint is not", remedy="give --checkpoint")
    require_targets(settings.upload)
    if settings.loading.quantization != "none" and settings.ablation.row_normalization != "none":
        raise UsageError(
            f"loading.quantization = {settings.loading.quantization} cannot be combined with "
            f"ablation.row_normalization = {settings.ablation.row_normalization}, which needs the full weights",
            remedy="use row_normalization = none, or load the model unquantised",
        )
    if settings.export_format == "adapter" and settings.ablation.row_normalization not in ("none", "pre"):
        raise UsageError(
            f"export_format = adapter cannot be combined with "
            f"ablation.row_normalization = {settings.ablation.row_normalization}, whose edits do not have low rank",
            remedy="use row_normalization = none or pre, or another format",
        )


def require_targets(targets: Iterable[str]) -> None:
    """Raise UsageError for a target that no delivery knows."""
    for target in targets:
        if not _TARGET.fullmatch(target):
            raise UsageError(
                f"upload target {target!r} is not supported",
                remedy="use file:///absolute/folder, hf://user/repo[@branch] or s3://bucket/prefix",
            )


def _refuse_unknown_detectors(settings: Settings) -> None:
    for name in settings.scoring.detectors:
        # Entry points are loaded only if one is requested.
        if name not in BUILTIN_SCORERS and name not in (known := known_scorers()):
            raise UsageError(
                f"scoring.detectors: there is no detector {name!r}",
                remedy=f"choose from {', '.join(known)}, or install the package that provides it",
            )
        _require_needed("scoring.detectors", name, settings)


def _refuse_wrong_objectives(settings: Settings) -> None:
    """Refuse objectives that no machine can search for; `require_scorers` says what this machine lacks."""
    names = settings.search.objectives
    for name in names:
        if name not in (*DEFAULT_OBJECTIVES, *MEASURES) and parse_objective(name) is None:
            raise UsageError(
                f"search.objectives: {name!r} is not of the form SCORER[@bad|@good|@both][:fewer|:more]",
                remedy=f"correct it; refusals, {', '.join(MEASURES)} are written alone",
            )
    if len(set(names)) < len(names):
        raise UsageError("search.objectives names one twice", remedy="leave out one of them")
    if set(names) <= set(MEASURES):
        raise UsageError(
            f"search.objectives = {names} measures change only, and no edit at all changes least",
            remedy="add refusals or a scorer",
        )
    if settings.scoring.pattern is not None:
        compiled(PATTERN, settings.scoring.pattern)
    if not all(word.strip() for word in settings.scoring.words):
        raise UsageError("scoring.words holds an empty word, which every response has", remedy="leave it out")
    if settings.judge.url is not None:
        refuse_exposing_url(settings.judge.url)


def refuse_exposing_url(url: str) -> None:
    """Raise UsageError for a judge's address that would expose responses or a key."""
    try:
        address = urlsplit(url)
    except ValueError:
        raise UsageError("judge.url is not an address", remedy="correct it") from None
    local = address.hostname in ("127.0.0.1", "localhost", "::1")
    if not address.hostname or not (address.scheme == "https" or (address.scheme == "http" and local)):
        raise UsageError(
            "judge.url is neither an https:// address nor one of this machine, so that all could read the responses",
            remedy="use https, or a tunnel to a port of this machine",
        )
    if address.username is not None or address.query or address.fragment:
        raise UsageError("judge.url holds more than an address", remedy="put the key into JUDGE_API_KEY")


def require_scorers(settings: Settings) -> None:
    """Raise UsageError if this machine lacks a scorer, or a setting of one, that the search's objectives name."""
    for one in judging(settings.search.objectives):
        if one.scorer not in BUILTIN_SCORERS and one.scorer not in (known := known_scorers()):
            raise UsageError(
                f"search.objectives: there is no scorer {one.scorer!r}",
                remedy=f"choose from {', '.join(known)}, or install the package that provides it",
            )
        _require_needed("search.objectives", one.scorer, settings)
    names = settings.search.objectives
    if CROSS_ENTROPY in names and settings.text_prompts is None:
        raise UsageError(f"search.objectives: {CROSS_ENTROPY} needs texts", remedy="set text_prompts")
    if TASKS in names:
        if not settings.scoring.tasks:
            raise UsageError(f"search.objectives: {TASKS} needs benchmarks", remedy="set scoring.tasks")
        require_extra("lm_eval", "the objective tasks")


def _require_needed(setting: str, scorer: str, settings: Settings) -> None:
    needed = NEEDED.get(scorer)
    if needed is None:
        return
    section, _, name = needed.partition(".")
    value = getattr(getattr(settings, section), name)
    if not value:
        what = "a model" if scorer in ("nli", "classifier") else "an endpoint" if scorer == "judge" else "to be told"
        raise UsageError(f"{setting}: {scorer} needs {what}", remedy=f"set {needed}")
    if scorer in ("nli", "classifier") and value.startswith(("/", ".", "~")) and not Path(value).expanduser().is_dir():
        raise UsageError(f"{needed}: there is no folder {value}", remedy="correct it")
    if scorer == "judge" and not settings.judge.model:
        raise UsageError(f"{setting}: judge needs a model", remedy="set judge.model")
