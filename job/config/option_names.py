"""Options of the command line whose setting stands in a table, and their values."""

from __future__ import annotations

from typing import Any

# By the option's name.
NESTED_OPTIONS = {
    "device": "loading.device",
    "device_map": "loading.device_map",
    "quantization": "loading.quantization",
    "trust_remote_code": "loading.trust_remote_code",
    "batch_size": "batching.rows",
}


def parsed_option(name: str, value: Any) -> Any:
    """Return an option's value as its setting takes it: a device map may be a TOML table."""
    if name != "device_map" or not str(value).lstrip().startswith("{"):
        return value
    from job.config.environment import toml_value

    return toml_value(value)
