"""Check the command for a rented machine before anything is paid for."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer

from job.config.load import LoadedSettings, load_settings
from job.config.option_names import NESTED_OPTIONS, parsed_option
from job.config.schema import ENVIRONMENT_PREFIX
from job.errors import UsageError
from job.records import Record

# Set by the image itself.
_IMAGE = {"ABLITERATE_WORKSPACE": "/workspace"}
_SHELLS = ("bash", "sh")


class Inner(Record):
    """What a command will do, as far as known.

    Attributes:
        checkpoint: The job's mirror, or None.
        notes: Unchecked or suspicious parts, one line each.
    """

    checkpoint: str | None = None
    when_done: str | None = None
    when_failed: str | None = None
    uploads: bool = False
    notes: tuple[str, ...] = ()


def check_inner(root: Any, words: Sequence[str], variables: Mapping[str, str], volume: bool) -> Inner:
    """Parse a command with `abliterate`'s parser (`root`) and settings, as the machine will.

    `volume` means a network volume at /workspace. Raises UsageError if it would fail with exit code 2, or needs a local
    file.
    """
    if words[0] in _SHELLS:
        return Inner(notes=(f"`{words[0]}` is run as given: the command that it starts is not checked",))
    values = _parsed(root, list(words))
    notes = _check_files(values, volume)
    if "assignments" not in values or "model" not in values:  # not a command with a job's settings
        return Inner(
            checkpoint=values.get("checkpoint") or variables.get("ABLITERATE_CHECKPOINT"),
            when_done=values.get("when_done"),
            when_failed=values.get("when_failed"),
            uploads=True,
            notes=tuple(notes),
        )
    loaded = _loaded(values, variables)
    settings = loaded.settings
    given = {name for name, source in loaded.sources.items() if source != "default"}
    return Inner(
        checkpoint=settings.checkpoint,
        when_done=settings.when_done if "when_done" in given else None,
        when_failed=settings.when_failed if "when_failed" in given else None,
        uploads=bool(settings.upload),
        notes=(*notes, *loaded.notes, *_local_only(loaded, volume), *_on_the_machine(loaded, volume)),
    )


def _parsed(root: Any, words: list[str]) -> dict[str, Any]:
    """Return a command's options and arguments by name. Raises UsageError if they are invalid, or only ask for help."""
    command, context = root, None
    try:
        while hasattr(command, "commands"):
            if not words:
                raise UsageError("the command to run there is incomplete", remedy="`abliterate --help` lists commands")
            name, words = words[0], words[1:]
            if name not in command.commands:
                raise UsageError(f"there is no command `abliterate {name}`", remedy="`abliterate --help` lists them")
            command = command.commands[name]
        context = command.make_context(command.name, words, **root.context_settings)
    except typer.Exit:
        raise UsageError("the command to run there only prints help", remedy="give the job's command") from None
    except Exception as error:
        message = getattr(error, "format_message", None)  # of the parser's own errors, whose class is not public
        if message is None:
            raise
        raise UsageError(f"the command to run there: {message()}", remedy=f"see `abliterate {name} --help`") from None
    return dict(context.params)


def _check_files(values: Mapping[str, Any], volume: bool) -> list[str]:
    """Return notes on files that must be in the image. Raises UsageError for local files."""
    notes = []
    for name, option in (("config", "--config"), ("reproduce", "--reproduce")):
        path = values.get(name)
        if path is None:
            continue
        there = volume and str(path).startswith("/workspace/")
        if not there and Path(path).exists():
            raise UsageError(
                f"{option} {path} is a file on this computer: the rented machine will not find it",
                remedy="give its settings with --set and --env ABLITERATE_NAME=VALUE, or put the file into your image",
            )
        notes.append(f"{option} {path} cannot be checked here: it has to be in the image or on the volume")
    return notes


def _loaded(values: Mapping[str, Any], variables: Mapping[str, str]) -> LoadedSettings:
    from job.config.load import setting_names

    settings = {name.partition(".")[0]: name.partition(".")[0] for name in setting_names()} | NESTED_OPTIONS
    options = {
        settings[name]: parsed_option(name, value)
        for name, value in values.items()
        if name in settings and value not in (None, [], ())
    }
    elsewhere = values.get("config") is not None or values.get("reproduce") is not None
    with _environment_of(variables):
        if elsewhere and "model" not in options:
            options["model"] = "named/elsewhere"
        return load_settings(options, profile=values.get("profile"), assignments=values.get("assignments") or [])


@contextmanager
def _environment_of(variables: Mapping[str, str]) -> Iterator[None]:
    former = {name: value for name, value in os.environ.items() if name.startswith(ENVIRONMENT_PREFIX)}
    theirs = {name: value for name, value in variables.items() if name.startswith(ENVIRONMENT_PREFIX)}
    try:
        for name in former:
            del os.environ[name]
        os.environ.update({**_IMAGE, **theirs})
        yield
    finally:
        for name in {**_IMAGE, **theirs}:
            os.environ.pop(name, None)
        os.environ.update(former)


def _local_only(loaded: LoadedSettings, volume: bool) -> Iterator[str]:
    settings = loaded.settings
    places = {"MODEL": settings.model}
    places |= {f"--{name.replace('_', '-')}": prompts.spec for name, prompts in settings.prompt_sets().items()}
    for name, place in places.items():
        path = place.partition("#")[0]
        local = path.startswith(("/", "./", "../", "~")) or Path(path).exists()
        if local and not (volume and path.startswith("/workspace/")):
            yield f"{name} {path} is a path and is not copied: it has to be in the image or on the volume"


def _on_the_machine(loaded: LoadedSettings, volume: bool) -> Iterator[str]:
    settings = loaded.settings
    for name, place in (("--checkpoint", settings.checkpoint), *(("--upload", place) for place in settings.upload)):
        if place and place.startswith("file:") and not (volume and place.startswith("file:///workspace/")):
            yield f"{name} {place} is on the rented machine and is lost with it"
