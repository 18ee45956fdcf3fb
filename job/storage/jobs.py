"""The jobs of a workspace: find, open, and refuse conflicting settings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import date
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from job.config.legacy import OBSOLETE
from job.config.load import default_values, leaves, merged, nested
from job.config.schema import Settings
from job.errors import JobError, UsageError
from job.model.files import parse_model
from job.records import JobRecord
from job.storage.atomic import ensure_folder
from job.storage.identity import extends, identify, job_id, stored, versions
from job.storage.run_folder import RunFolder
from job.text.redaction import MASK, redacted_json


def find_folder(settings: Settings) -> RunFolder:
    """Return the run folder for settings, which need not exist; writes nothing."""
    try:
        identity = _identified(settings, {}, write=False)
    except JobError:
        # What is missing has a check of its own.
        return RunFolder(Path(settings.workspace) / "-")
    return RunFolder(Path(settings.workspace) / job_id(identity))


def _identified(settings: Settings, pinned: Mapping[str, Any], *, write: bool = True) -> dict[str, Any]:
    """Return a job's identity; of one that a former version began without naming its method, "tpe", that one."""
    identity = {**identify(settings, write=write), **pinned}
    if settings.search.method == "tpe":
        unnamed = {name: value for name, value in identity["search"].items() if name != "method"}
        former = {**identity, "search": unnamed}
        folder = RunFolder(Path(settings.workspace) / job_id(former))
        begun = folder.read_job().resolution if folder.job_file.exists() else None
        if begun is not None and begun.method is None:
            return former
    return identity


def open_job(settings: Settings, *, new: bool, pinned: Mapping[str, Any] | None = None) -> tuple[RunFolder, JobRecord]:
    """Return the run folder for settings, created at the first start, and the record, not yet written.

    `new` starts a job beside one with other settings; `pinned` fields make it a separate job. Raises
    ImpossibleJobError, MachineError, or UsageError for a job with other settings without `new`.
    """
    identity = _identified(settings, pinned or {})
    folder = RunFolder(Path(settings.workspace) / job_id(identity))
    if not folder.job_file.exists() and not new and not pinned:
        others = {other.path.name: other.read_job().identity for other in jobs_in(folder.path.parent)}
        refuse_other_settings(str(folder.path.parent), others, identity)
    ensure_folder(folder.path)
    today = date.today().isoformat()
    if folder.job_file.exists():
        record = folder.read_job()
        return folder, record.model_copy(update={"settings": _located(settings), "started": record.started or today})
    record = JobRecord(
        job_id=folder.path.name,
        identity=identity,
        settings=_located(settings),
        startup_trials=settings.asked_startup_trials,
        started=today,
        versions=versions(),
        **(pinned or {}),
    )
    return folder, record


def _located(settings: Settings) -> dict[str, Any]:
    """Return all settings with the model's absolute path, so that later commands work from any folder."""
    source = parse_model(settings.model)
    model = str(Path(source.name).absolute()) if source.kind == "folder" else settings.model
    return {**stored(settings), "model": model}


def refuse_other_settings(place: str, others: Mapping[str, Mapping[str, Any]], identity: Mapping[str, Any]) -> None:
    """Raise UsageError if a workspace or checkpoint has a job on the same model with other settings."""
    for name, other in others.items():
        if other.get("model") != identity["model"] or "reproduces" in other:
            continue
        differences = sorted(_differences(other, identity))
        raise UsageError(
            f"{place} holds job {name} on this model with other settings: " + "; ".join(differences),
            remedy="restore them to continue it, or give --new to start another job",
        )


def _differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key in {*old, *new}:
        before, after = old.get(key), new.get(key)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            yield from _differences(before, after, f"{prefix}{key}.")
        elif before != after:
            yield f"{prefix}{key} was {_abbreviated(before)}, is {_abbreviated(after)}"


def _abbreviated(value: Any) -> str:
    text = redacted_json(value)  # before it is cut: a part of a secret is not recognised
    return text if len(text) <= 40 else text[:37] + "..."


def jobs_in(workspace: Path) -> list[RunFolder]:
    """Return a workspace's run folders by name."""
    if not workspace.is_dir():
        return []
    folders = [RunFolder(path) for path in sorted(workspace.iterdir()) if path.is_dir()]
    return [folder for folder in folders if folder.job_file.exists()]


def find_job(workspace: Path, name: str | None) -> RunFolder:
    """Return a named job, or the only one. Raises UsageError if there is none, or several and none is named."""
    folders = jobs_in(workspace)
    names = ", ".join(folder.path.name for folder in folders)
    if name is not None:
        for folder in folders:
            if folder.path.name == name:
                return folder
        raise UsageError(
            f"there is no job {name} in {workspace}",
            remedy=f"choose from: {names}" if names else "check --workspace",
        )
    if not folders:
        raise UsageError(
            f"there is no job in {workspace}", remedy="check --workspace, or start a job with `abliterate run`"
        )
    if len(folders) > 1:
        raise UsageError(f"{workspace} holds several jobs: {names}", remedy="name one with --job")
    return folders[0]


def job_settings(folder: RunFolder, *, whole: bool = False, **others: object) -> Settings:
    """Return a job's latest settings, overridden by `others`. Raises UsageError for another version's.

    Without `whole`, settings that only extend a job fall back to defaults if they held a secret.
    """
    record = folder.read_job()
    masked = _masked(record) - leaves(others).keys() - {"workspace"}
    lost = sorted(name for name in masked if whole or not extends(name))
    if lost:
        raise UsageError(
            f"job {record.job_id} was given a secret in {', '.join(lost)}, which is not stored",
            remedy="continue with the same `abliterate run` command, or give the setting with --set",
        )
    # What a former version did not know is as it was before.
    gone = masked | OBSOLETE.keys()
    kept = nested({name: value for name, value in leaves(record.settings).items() if name not in gone})
    stored = merged(default_values(), {**kept, "workspace": str(folder.path.parent)})
    try:
        return Settings(**merged(stored, others))
    except ValidationError as error:
        made_by = record.versions.get("abliteration-job", "another version")
        raise UsageError(
            f"this version cannot read the settings of job {record.job_id}: {error.errors()[0]['msg']}",
            remedy=f"continue with the version that started the job, {made_by}",
        ) from error


def settings_if_readable(folder: RunFolder) -> Settings | None:
    """Return a job's latest settings; None for another version's, or without a readable job.json."""
    try:
        return job_settings(folder)
    except JobError:
        return None


def _masked(record: JobRecord) -> set[str]:
    """Return the settings that held a secret, by dotted key."""
    stored = leaves(record.settings)
    return {name for name, value in stored.items() if name.partition(".")[0] in record.redacted and MASK in str(value)}
