"""Every command prints its result as JSON on request."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from typer.main import get_command

from job.cli.main import app

# Commands without --json, and why.
WITHOUT = {"worker": "was removed, and ends with the name of what took its place"}


def commands(command: Any, words: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    """Yield every command by its words, hidden ones too."""
    below = getattr(command, "commands", None)
    if below is None:
        yield " ".join(words), command
        return
    for name, part in below.items():
        yield from commands(part, (*words, name))


def test_every_command_takes_json_but_those_with_a_reason() -> None:
    found = dict(commands(get_command(app)))
    assert {"run", "demo", "config show", "cloud vast watch", "cloud runpod destroy"} <= found.keys()
    without = {name for name, command in found.items() if not any("--json" in option.opts for option in command.params)}
    assert without == WITHOUT.keys()


def test_json_is_a_switch_that_is_off() -> None:
    for name, command in commands(get_command(app)):
        for option in command.params:
            if "--json" in option.opts:
                assert (option.is_flag, option.default, bool(option.help)) == (True, False, True), name
