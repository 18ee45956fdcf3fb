"""Describe all settings: name, value as TOML, source."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from job.config.load import _flatten, _merged, _validated, setting_names
from job.config.schema import Settings


def as_toml(value: Any) -> str:
    """Return a value as TOML on one line."""
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{json.dumps(key)} = {as_toml(part)}" for key, part in value.items()) + " }"
    if isinstance(value, list):
        return "[" + ", ".join(map(as_toml, value)) + "]"
    return json.dumps(value, ensure_ascii=False)


def settings_table(
    options: Mapping[str, Any],
    *,
    profile: str | None = None,
    config: Path | None = None,
    assignments: Iterable[str] = (),
) -> dict[str, dict[str, Any]]:
    """Return value and source of each setting that is set, by dotted key. Raises UsageError."""
    settings, sources, _ = _possibly_incomplete(options, profile, config, assignments)
    values = dict(_flatten(settings.model_dump(mode="json")))
    return {name: {"value": values[name], "source": sources[name]} for name in setting_names() if name in sources}


def _possibly_incomplete(
    options: Mapping[str, Any], profile: str | None, config: Path | None, assignments: Iterable[str]
) -> tuple[Settings, dict[str, str], list[str]]:
    values, sources, notes = _merged(options, profile, config, assignments)
    # Placeholder for settings required only to run a job.
    required = {key: "-" for key, field in Settings.model_fields.items() if field.is_required()}
    return _validated({**required, **values}, sources), sources, notes


def describe_settings(
    options: Mapping[str, Any],
    *,
    profile: str | None = None,
    config: Path | None = None,
    assignments: Iterable[str] = (),
) -> tuple[Settings, list[str]]:
    """Return the settings, possibly incomplete, and a line for each and for renamed ones. Raises UsageError."""
    settings, sources, notes = _possibly_incomplete(options, profile, config, assignments)
    values = dict(_flatten(settings.model_dump(mode="json")))
    lines = []
    for name in setting_names():
        if name in sources:
            lines.append(f"{name} = {as_toml(values[name])}  # {sources[name]}")
        elif not name.partition(".")[0].endswith("_prompts") or name.endswith(".spec"):
            lines.append(f"# {name.removesuffix('.spec')} is not set")
    return settings, [*lines, *(f"# {note}" for note in notes)]
