"""Settings, credentials and endpoints as people have them."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.cases import Case

# Nothing listens there: a credential or an endpoint with a fault must be refused before any request.
NOWHERE = "http://127.0.0.1:9"
KEYS = {
    "AWS_ACCESS_KEY_ID": "AKIASPOONFULOFSUGAR0",
    "AWS_SECRET_ACCESS_KEY": "very-secret-spoon",
    "AWS_DEFAULT_REGION": "us-east-1",
}
HUB = {"HF_HUB_OFFLINE": "0", "HTTPS_PROXY": NOWHERE}
TOKEN = "hf_" + "cook" * 6
TO_S3, TO_HUB = ("--upload", "s3://kitchen/models"), ("--upload", "hf://cook/edited")
NO_PART = "which cannot be part of a key or token"


def file(text: bytes) -> Callable[[Path], Sequence[str]]:
    """Return what writes a settings file and names it."""

    def options(folder: Path) -> Sequence[str]:
        (folder / "job.toml").write_bytes(text)
        return ("--config", str(folder / "job.toml"))

    return options


def settings(told: Sequence[str], *options: str) -> Case:
    return Case(told, 2, options=options)


SETTINGS = {
    "an unknown setting": Case(["trails", "did you mean trials?"], 2, options=file(b"trails = 3\n")),
    "a settings file with a BOM": Case(options=file(codecs.BOM_UTF8 + b"seed = 3\n"), row=23),
    "a settings file in UTF-16": Case(options=file("seed = 3\n".encode("utf-16")), row=23),
    "no trials": settings(["trials = 0"], "--trials", "0"),
    "more start-up trials than trials": settings(["startup_trials = 3", "trials = 1"], "--startup-trials", "3"),
    "an unknown type of numbers": settings(["loading.dtypes"], "--set", 'loading.dtypes=["float7"]'),
    "a check that does not exist": settings(["--allow disk.spice", "disk.space"], "--allow", "disk.spice"),
}


def stray(name: str, value: str, holds: str, *options: str, row: int | None = None) -> Case:
    given = {**(HUB if name == "HF_TOKEN" else KEYS), name: value}
    return Case([f"{name} holds {holds}, {NO_PART}"], 3, options=options, environment=given, row=row)


CREDENTIALS = {
    "a key that ends with a carriage return": stray(
        "AWS_ACCESS_KEY_ID", "AKIASPOONFULOFSUGAR0\r", "a carriage return", *TO_S3, row=16
    ),
    "a secret that ends with a line break": stray(
        "AWS_SECRET_ACCESS_KEY", "very-secret-spoon\n", "a line break", *TO_S3
    ),
    "a session's token in quotes": stray("AWS_SESSION_TOKEN", "'spoon-of-today'", "quotes", *TO_S3),
    "the Hub's token in quotes": stray("HF_TOKEN", f'"{TOKEN}"', "quotes", *TO_HUB, row=16),
    "the Hub's token with a space of no width": stray(
        "HF_TOKEN", f"{TOKEN}\u200b", "a character that is not ASCII", *TO_HUB
    ),
    "the Hub's token in quotes, for a model": Case(
        [f"HF_TOKEN holds quotes, {NO_PART}"], 3, model="cook/known", environment={**HUB, "HF_TOKEN": f'"{TOKEN}"'}
    ),
}


def endpoint_of(place: str) -> Case:
    words = (place, "s3://kitchen/models", "--set", f"s3.endpoint={NOWHERE}/kitchen/")
    return Case(
        ["names the bucket kitchen", f"--set s3.endpoint={NOWHERE} (or in AWS_ENDPOINT_URL)"],
        2,
        options=words,
        environment=KEYS,
        row=15,
    )


ENDPOINTS = {
    "an endpoint with the bucket": endpoint_of("--upload"),
    "an endpoint with the bucket, for a checkpoint": endpoint_of("--checkpoint"),
    "an endpoint with the bucket in a variable": Case(
        ["names the bucket kitchen", f"--set s3.endpoint={NOWHERE} (or in AWS_ENDPOINT_URL)"],
        2,
        options=TO_S3,
        environment={**KEYS, "AWS_ENDPOINT_URL": f"{NOWHERE}/kitchen"},
    ),
}


def place(option: str, make: Callable[[Path], object], below: str = "") -> Callable[[Path], Sequence[str]]:
    """Return what makes something that is no folder, and names it, or a folder below it, as a place of the job's."""
    scheme = "" if option == "--workspace" else "file://"

    def options(folder: Path) -> Sequence[str]:
        make(folder / "place")
        return (option, f"{scheme}{folder / 'place'}{below}")

    return options


def a_file(path: Path) -> None:
    path.write_text("a shopping list\n")


def a_loop(path: Path) -> None:
    path.symlink_to(path)


def a_link_to_none(path: Path) -> None:
    path.symlink_to(path.with_name("made"))


def a_link_to_a_folder(path: Path) -> None:
    path.with_name("made").mkdir()
    a_link_to_none(path)


def a_link_to_a_mount_point(path: Path) -> None:
    path.symlink_to("/proc")


PLACES = {
    "a file as the checkpoint": Case(code=76, options=place("--checkpoint", a_file)),
    "a checkpoint below a file": Case(code=76, options=place("--checkpoint", a_file, "/jobs")),
    "a checkpoint at a link to itself": Case(code=76, options=place("--checkpoint", a_loop)),
    "a checkpoint at a link to no folder": Case(options=place("--checkpoint", a_link_to_none)),
    "a file as the target": Case(code=3, options=place("--upload", a_file)),
    "a target below a file": Case(code=76, options=place("--upload", a_file, "/edited")),
    "a target at a link to itself": Case(code=76, options=place("--upload", a_loop)),
    "a target at a link to no folder": Case(options=place("--upload", a_link_to_none)),
    "a target at a link to a folder": Case(options=place("--upload", a_link_to_a_folder)),
    "a mount point as the target": Case(code=3, options=place("--upload", a_link_to_a_mount_point)),
    "a file as the workspace": Case(code=76, options=place("--workspace", a_file)),
    "a workspace below a file": Case(code=76, options=place("--workspace", a_file, "/runs")),
    "a workspace at a link to itself": Case(code=76, options=place("--workspace", a_loop)),
    "a workspace at a link to no folder": Case(options=place("--workspace", a_link_to_none)),
}

OTHERS = {**SETTINGS, **CREDENTIALS, **ENDPOINTS}
