"""Presets of behaviours to remove: prompts, markers and words of each, in a TOML file of its name."""

from __future__ import annotations

import tomllib
from importlib import resources
from typing import Any, Literal, get_args

Behaviour = Literal["refusal", "over-refusal", "disclaimers", "flattery", "prose"]
BEHAVIOURS: tuple[str, ...] = get_args(Behaviour)


def behaviour_values(name: Any) -> dict[str, Any]:
    """Return a behaviour's values as nested tables; none for refusal, the default, and for unknown names."""
    if name not in BEHAVIOURS[1:]:
        return {}
    return tomllib.loads(resources.files("job.config.behaviours").joinpath(f"{name}.toml").read_text("utf-8"))
