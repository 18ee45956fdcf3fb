"""Refuse contradictory settings."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from job.config.schema import _TARGET, Settings
from job.config.scorers import BUILTIN_SCORERS, known_scorers
from job.config.sections import ScoringSettings
from job.errors import UsageError


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
    _refuse_unknown_detectors(settings.scoring)
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


def _refuse_unknown_detectors(scoring: ScoringSettings) -> None:
    for name in scoring.detectors:
        # Entry points are loaded only if one is requested.
        if name not in BUILTIN_SCORERS and name not in (known := known_scorers()):
            raise UsageError(
                f"scoring.detectors: there is no detector {name!r}",
                remedy=f"choose from {', '.join(known)}, or install the package that provides it",
            )
    if "nli" in scoring.detectors:
        if scoring.nli_model is None:
            raise UsageError("scoring.detectors: nli needs a model", remedy="set scoring.nli_model")
        if scoring.nli_model.startswith(("/", ".", "~")) and not Path(scoring.nli_model).expanduser().is_dir():
            raise UsageError(f"scoring.nli_model: there is no folder {scoring.nli_model}", remedy="correct it")
