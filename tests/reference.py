"""Reference of all settings, from their descriptions.

`python -m tests.reference --write docs/settings.md` writes it.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from job.cli.options import SETTING_OPTIONS
from job.config.describe import as_toml
from job.config.load import default_values
from job.config.option_names import NESTED_OPTIONS
from job.config.schema import ENVIRONMENT_PREFIX, Settings
from job.config.sections import PromptSettings
from tests.generated import write_or_print

_INTRODUCTION = f"""# Settings

Every setting can be given in three places. Later ones override earlier ones:

1. a TOML file: `--config FILE.toml`,
2. the environment: `{ENVIRONMENT_PREFIX}` and the name in capitals, `__` for a dot, as in
   `{ENVIRONMENT_PREFIX}SEARCH__SPACE=field`,
3. the command line: the setting's option, or `--set NAME=VALUE`, where the value is TOML.

`abliterate config show` prints the values in effect and where they come from. Written by
`python -m tests.reference --write docs/settings.md`.
"""


def page() -> str:
    lines, prompt_sets = [_INTRODUCTION, *_table("General", Settings, default_values(), "")], []
    for name, field in Settings.model_fields.items():
        section = _section(field)
        if section is PromptSettings:
            prompt_sets.append(name)
        elif section is not None:
            about = (section.__doc__ or "").strip()
            lines += [
                "",
                *_table(
                    f"`[{name}]`: {about[0].lower()}{about[1:].rstrip('.')}",
                    section,
                    default_values().get(name, {}),
                    f"{name}.",
                ),
            ]
    lines += ["", *_table("Prompt sets", PromptSettings, {}, ""), ""]
    lines.append(f"These are {', '.join(f'`{name}`' for name in prompt_sets)}; each a spec alone or a table of these.")
    return "\n".join(lines) + "\n"


def _table(title: str, section: type[BaseModel], defaults: Mapping[str, Any], prefix: str) -> Iterator[str]:
    options = {NESTED_OPTIONS.get(name, name): name for name in SETTING_OPTIONS}
    yield f"## {title}\n"
    yield "| Setting | Values | Default | |\n|---|---|---|---|"
    for name, field in section.model_fields.items():
        if _section(field) is None:
            option = f" (`--{options[key].replace('_', '-')}`)" if (key := f"{prefix}{name}") in options else ""
            default = f"`{_short(as_toml(defaults[name]))}`" if name in defaults else "unset"
            option = " (`MODEL`)" if name == "model" else option
            about = (field.description or "").replace("|", "&#124;")
            yield f"| `{prefix}{name}`{option} | {_values(field.annotation)} | {default} | {about} |"


def _short(text: str) -> str:
    return text if len(text) < 60 else text[:50] + " …"


def _section(field: FieldInfo) -> type[BaseModel] | None:
    for kind in (field.annotation, *typing.get_args(field.annotation)):
        kind = typing.get_args(kind)[0] if typing.get_origin(kind) is typing.Annotated else kind
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            return kind
    return None


def _values(kind: Any) -> str:
    """Describe a setting's allowed values."""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Annotated:
        return _values(parts[0])
    if origin is typing.Literal:
        return ", ".join(f"`{part}`" for part in parts)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_values(part) for part in parts if part is not type(None))
    if origin in (list, tuple):
        return f"list of {_values(parts[0])}"
    if origin is dict:
        return "table"
    return {int: "whole number", float: "number", bool: "`true`, `false`", str: "text"}.get(kind, str(kind))


if __name__ == "__main__":
    write_or_print(page())
