"""The default settings, without the packages that check settings."""

from __future__ import annotations

import tomllib
from importlib import resources
from typing import Any


def default_values() -> dict[str, Any]:
    """Return the contents of default.toml."""
    return tomllib.loads(resources.files("job.config").joinpath("default.toml").read_text("utf-8"))
