"""Help of the commands: options in groups with their defaults and choices, and examples at the end."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Annotated, Any, get_args

from job.cli.examples import EXAMPLES
from job.config.defaults import default_values
from job.text.durations import Unit, duration

# The group of each setting's option, in the order in which help shows them.
GROUPS: Mapping[str, tuple[str, ...]] = {
    "Prompts": (
        *("good_prompts", "bad_prompts", "good_eval_prompts", "bad_eval_prompts"),
        *("good_report_prompts", "bad_report_prompts"),
    ),
    "Search": ("trials", "startup_trials", "seed", "kl_tokens", "skip_kl_above"),
    "Model and machine": (
        *("device", "device_map", "quantization", "batch_size", "tune", "trust_remote_code", "workers", "engine"),
        *("address", "wait_for_gpu"),
    ),
    "Limits": ("max_hours", "max_cost", "price", "grace", "allow", "max_kl", "max_refusals"),
    "Results": ("export_format", "upload", "visibility"),
    "Places and interruptions": ("workspace", "checkpoint", "require_checkpoint", "when_done", "when_failed"),
}
SOURCES = "Settings from elsewhere"
_GROUP_OF = {name: group for group, names in GROUPS.items() for name in names}


def examples(command: str, platform: str = "") -> str:
    """Return a command's examples as the end of its help."""
    words = f"abliterate {command}"
    if platform:
        words = words.replace("cloud", f"cloud {platform}")
    return "\n\n".join(("**Examples**", *(f"- `{f'{words} {given}'.strip()}`" for given in EXAMPLES[command])))


def grouped(options: Mapping[str, Any], settings: Mapping[str, str]) -> dict[str, Any]:
    """Return options with their group and the default of their setting, which `settings` names where it differs."""
    defaults = default_values()
    found = {
        name: _in_group(kind, _GROUP_OF.get(name), _default(defaults, settings.get(name, name)))
        for name, kind in options.items()
    }
    order = [name for names in GROUPS.values() for name in names]
    return {name: found[name] for name in sorted(found, key=lambda name: order.index(name) if name in order else -1)}


def in_group(options: Mapping[str, Any], group: str) -> dict[str, Any]:
    """Return options in one group."""
    return {name: _in_group(kind, group, None) for name, kind in options.items()}


def _in_group(kind: Any, group: str | None, default: str | None) -> Any:
    kind, info = get_args(kind)
    info = copy.copy(info)
    info.rich_help_panel = group
    if default is not None:
        info.show_default = default
    return Annotated[kind, info]


def _default(defaults: Mapping[str, Any], name: str) -> str | None:
    value: Any = defaults
    for part in name.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    if value is None or value is False or value == []:
        return None
    return f"{value:g}" if isinstance(value, float) else str(value).partition("#")[0]


def parsed(unit: Unit, least: float = 0.0) -> Callable[[object], Any]:
    """Return a parser of durations in a unit."""

    def parse(value: object) -> Any:
        import typer

        try:
            found = duration(value, unit)
        except ValueError as error:
            raise typer.BadParameter(str(error)) from None
        if isinstance(found, float) and not found >= least:
            raise typer.BadParameter(f"{value} is less than {least:g}")
        return found

    return parse
