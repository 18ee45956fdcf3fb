"""Values of settings as text: TOML, in the environment and on the command line."""

from __future__ import annotations

import tomllib
from typing import Any

from pydantic.fields import FieldInfo
from pydantic_settings import EnvSettingsSource


def toml_value(text: str) -> Any:
    """Parse a TOML value, or return the text itself."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


class EnvironmentSource(EnvSettingsSource):
    """ABLITERATE_* variables, parsed as TOML where possible, like --set."""

    def decode_complex_value(self, field_name: str, field: FieldInfo, value: Any) -> Any:
        """Parse a nested setting's variable as TOML, not as JSON like pydantic; keep other text as it is."""
        return toml_value(value)
