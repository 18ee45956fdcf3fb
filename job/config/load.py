"""Load settings: command line > environment > TOML file > behaviour > defaults, each value with its source."""

from __future__ import annotations

import dataclasses
import difflib
import os
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from job.config.behaviours import behaviour_values
from job.config.checks import _refuse_contradictions
from job.config.defaults import default_values as default_values
from job.config.environment import EnvironmentSource, toml_value
from job.config.legacy import OBSOLETE, translated
from job.config.schema import ENDS, ENVIRONMENT_PREFIX, Settings
from job.config.sections import SPEC_QUALIFIERS, PromptSettings, spec_table
from job.errors import UsageError
from job.text.decoding import decoded


class LoadedSettings:
    """Settings, the source of each value by dotted key, and notes on old names."""

    def __init__(self, settings: Settings, sources: dict[str, str], notes: list[str]) -> None:
        self.settings = settings
        self.sources = sources
        self.notes = notes


@dataclass(frozen=True)
class FixedSettings:
    """Settings fixed by one of our files, by dotted key.

    Attributes:
        origins: Model and prompts, which may be overridden.
        left_out: Untrusted values in the file.
    """

    source: str
    values: Mapping[str, Any]
    origins: Mapping[str, Any]
    left_out: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def load_settings(
    options: Mapping[str, Any],
    *,
    profile: str | None = None,
    config: Path | None = None,
    assignments: Iterable[str] = (),
    fixed: FixedSettings | None = None,
) -> LoadedSettings:
    """Merge all sources and validate the result. Raises UsageError.

    Args:
        options: Command-line options, by dotted key.
        profile: Built-in profile, between the defaults and the file.
        config: A TOML file.
        assignments: ``--set key=value``, treated as command-line options.
        fixed: Settings fixed by a file.
    """
    values, sources, notes = _merged(options, profile, config, assignments, fixed)
    return LoadedSettings(_validated(values, sources), sources, notes)


def _merged(
    options: Mapping[str, Any],
    profile: str | None,
    config: Path | None,
    assignments: Iterable[str],
    fixed: FixedSettings | None = None,
) -> tuple[dict[str, Any], dict[str, str], list[str]]:
    """Return merged values as nested tables, the source of each by dotted key, and notes on old names."""
    notes: list[str] = []
    layers: list[tuple[str, dict[str, Any]]] = [("default", default_values())]
    if profile is not None:
        layers.append((f"profile {profile}", _profile(profile)))
    if config is not None:
        table, notes = translated(_read_toml(config))
        layers.append((str(config), _nested(table.items())))
    layers.append(("environment", _environment()))
    if fixed is not None:
        layers.append((fixed.source, _nested(fixed.origins.items())))
    layers.append(("command line", _nested([*options.items(), *map(_assignment, assignments)])))
    if fixed is not None:
        layers.append((fixed.source, _nested(fixed.values.items())))
    _add_behaviour(layers, profile)
    merged: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for name, layer in layers:
        _check_names(layer, Settings, name)
        for key, value in _flatten(layer):
            if key.endswith(".spec"):
                _forget_qualifiers(merged, sources, key)
            _put(merged, key, value)
            sources[key] = name
    return merged, sources, notes


def _add_behaviour(layers: list[tuple[str, dict[str, Any]]], profile: str | None) -> None:
    """Put the asked behaviour's values above the defaults. Raises UsageError if a profile sets the same."""
    behaviour = next(layer["behaviour"] for _, layer in reversed(layers) if "behaviour" in layer)
    values = behaviour_values(behaviour)
    if profile is not None and (both := sorted(leaves(values).keys() & leaves(_profile(profile)).keys())):
        raise UsageError(
            f"--profile {profile} and the behaviour {behaviour} both set {both[0]}", remedy="leave out one of them"
        )
    layers.insert(1, (f"behaviour {behaviour}", values))


def _forget_qualifiers(merged: dict[str, Any], sources: dict[str, str], key: str) -> None:
    """Drop the qualifiers of an overridden spec: its split does not apply to the new one."""
    table = key.removesuffix(".spec")
    for name in SPEC_QUALIFIERS:
        if sources.pop(f"{table}.{name}", None):
            del merged[table][name]


def profiles() -> list[str]:
    """Return the names of built-in profiles."""
    return sorted(
        file.name.removesuffix(".toml") for file in resources.files("job.config").joinpath("profiles").iterdir()
    )


def _profile(name: str) -> dict[str, Any]:
    if name not in profiles():
        raise UsageError(f"there is no profile {name}", remedy=f"choose from: {', '.join(profiles())}")
    return tomllib.loads(resources.files("job.config").joinpath(f"profiles/{name}.toml").read_text("utf-8"))


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(decoded(path.read_bytes()))
    except FileNotFoundError:
        raise UsageError(f"there is no settings file {path}", remedy="check --config") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"cannot read the settings file {path}: {error}", remedy="give a readable TOML file in UTF-8"
        ) from error
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{path} is not valid TOML: {error}", remedy="correct the file") from error


def _environment() -> dict[str, Any]:
    """Return the settings in the environment; unknown names are refused."""
    for name in os.environ:
        if name.startswith(ENVIRONMENT_PREFIX):
            path = name.removeprefix(ENVIRONMENT_PREFIX).lower().split("__")
            _check_names(_nested([(".".join(path), None)]), Settings, f"the environment ({name})")
    source = EnvironmentSource(
        Settings, env_prefix=ENVIRONMENT_PREFIX, env_nested_delimiter="__", env_ignore_empty=True
    )
    return source()


def assigned(assignments: Iterable[str]) -> dict[str, Any]:
    """Parse ``key=value`` assignments into nested tables. Raises UsageError for malformed or unknown ones."""
    found = _nested(map(_assignment, assignments))
    _check_names(found, Settings, "command line")
    return found


def leaves(tables: Mapping[str, Any]) -> dict[str, Any]:
    """Flatten nested tables to dotted keys; unknown names are kept."""
    return dict(_flatten(tables))


def nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """Convert dotted keys to nested tables."""
    return _nested(values.items())


def environment_values() -> dict[str, Any]:
    """Return the settings in the environment, by dotted key."""
    return leaves(_environment())


def merged(values: Mapping[str, Any], others: Mapping[str, Any]) -> dict[str, Any]:
    """Merge nested tables; `others` win."""
    found = dict(values)
    for key, value in others.items():
        below = found.get(key)
        found[key] = merged(below, value) if isinstance(below, Mapping) and isinstance(value, Mapping) else value
    return found


def _assignment(text: str) -> tuple[str, Any]:
    key, separator, value = text.partition("=")
    if not separator or not key.strip():
        raise UsageError(f"--set {text}: not of the form key=value", remedy="write --set trials=50")
    return key.strip(), toml_value(value.strip())


def _nested(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """Convert dotted keys to nested tables; later pairs win."""
    tables: dict[str, Any] = {}
    for key, value in pairs:
        _put(tables, key, value)
    return tables


def _put(tables: dict[str, Any], key: str, value: Any) -> None:
    *parents, leaf = key.split(".")
    table = tables
    for parent in parents:
        below = table.setdefault(parent, {})
        if not isinstance(below, dict):
            below = table[parent] = spec_table(below)
        table = below
    table[leaf] = value


def _flatten(
    tables: Mapping[str, Any], section: type[BaseModel] | None = None, prefix: str = ""
) -> Iterable[tuple[str, Any]]:
    """Yield all values by dotted key; a bare spec becomes its prompt set's spec."""
    for key, value in tables.items():
        field = (section or Settings).model_fields.get(key)
        inner = _section(field) if field is not None else None
        if inner is PromptSettings:
            value = spec_table(value)
        if inner is not None and isinstance(value, Mapping):  # other tables are plain values
            yield from _flatten(value, inner, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _section(field: FieldInfo) -> type[BaseModel] | None:
    candidates = [field.annotation, *getattr(field.annotation, "__args__", ())]
    for candidate in candidates:
        candidate = getattr(candidate, "__origin__", candidate)
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None


def _check_names(table: Mapping[str, Any], section: type[BaseModel], source: str, prefix: str = "") -> None:
    for key, value in table.items():
        field = section.model_fields.get(key)
        if field is None:
            raise UsageError(f"unknown setting {prefix}{key} in {source}", remedy=_nearest(prefix + key))
        below = _section(field)
        if isinstance(value, Mapping) and below is not None:
            _check_names(value, below, source, f"{prefix}{key}.")


def _nearest(key: str) -> str:
    if key in OBSOLETE:
        return OBSOLETE[key]
    close = difflib.get_close_matches(key, list(setting_names()), n=1, cutoff=0.5)
    return f"did you mean {close[0]}?" if close else "`abliterate config show` lists all settings"


def setting_names(section: type[BaseModel] = Settings, prefix: str = "") -> Iterable[str]:
    """Yield the dotted names of all settings."""
    for name, field in section.model_fields.items():
        below = _section(field)
        if below is None:
            yield prefix + name
        else:
            yield from setting_names(below, f"{prefix}{name}.")


def _validated(merged: dict[str, Any], sources: Mapping[str, str]) -> Settings:
    try:
        settings = Settings(**merged)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"] if isinstance(part, str))
        if first["type"] == "missing":
            raise UsageError(f"{key} is not set", remedy=_how_to_give(key)) from None
        source = sources.get(key, "the settings")
        shown = first["msg"][0].lower() + first["msg"][1:]
        raise UsageError(f"{key} = {first['input']!r} ({source}): {shown}", remedy="correct it") from None
    _refuse_contradictions(settings)
    return settings


def default_workspace() -> str:
    """Return the workspace if the command line has none."""
    workspace = _environment().get("workspace", default_values()["workspace"])
    return str(workspace)


def asked_ends(options: Mapping[str, str | None]) -> dict[str, str]:
    """Return this command's own when_done and when_failed: a job's record must not end machines. Raises UsageError."""
    environment = _environment()
    found = {}
    for name in ENDS:
        value = str(options.get(name) or environment.get(name) or "nothing")
        if value not in ("nothing", "stop", "destroy"):
            raise UsageError(f"{name} = {value!r} is not known", remedy="choose from: nothing, stop, destroy")
        found[name] = value
    return found


def _how_to_give(key: str) -> str:
    option = "MODEL" if key == "model" else "--" + key.removesuffix(".spec").replace("_", "-")
    return f"give {option} or set it in a TOML file"
