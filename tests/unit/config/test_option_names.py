"""Options of the command line whose setting stands in a table."""

from __future__ import annotations

import pytest

from job.config.option_names import parsed_option


@pytest.mark.parametrize(
    ("name", "given", "value"),
    [
        ("device_map", '{"" = 0}', {"": 0}),
        ("device_map", ' { "model.layers.0" = "cpu" }', {"model.layers.0": "cpu"}),
        ("device_map", "balanced", "balanced"),
        ("device", "{cpu}", "{cpu}"),
        ("batch_size", 8, 8),
    ],
)
def test_a_device_map_may_be_a_table(name: str, given: object, value: object) -> None:
    assert parsed_option(name, given) == value
