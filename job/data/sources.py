"""Sources of prompts: files, folders, saved, built-in and Hub datasets, streamed row by row.

A SPEC is a file, ``FOLDER[:CONFIG]``, ``builtin:NAME`` or ``DATASET[@REV][:CONFIG]``, optionally followed by
``#SPLIT[/COLUMN]``. SPLIT is ``train``, ``train[:400]``, ``train[100:200]`` or, without shell characters,
``train:400``.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from job.config.sections import PromptSettings
from job.data.columns import ColumnTexts, RowText
from job.data.files import SUFFIXES, Row, file_rows, readable
from job.data.folders import folder_files, folder_rows, left_out
from job.data.hub import hub_rows
from job.errors import UsageError
from job.system.hub_client import is_offline, with_retries

DEFAULT_SPLIT = "train"
# More rows than any job needs: a split without an end is probably an oversight, and C4 has 365 million.
MOST_ROWS = 20_000
_PATHS = ("/", "./", "../", "~")
# Prompts that come with this package, in job/data/builtin.
BUILTIN = "builtin:"
_SPLIT = re.compile(r"(?P<name>[\w.-]+)(?:\[(?P<start>\d*):(?P<stop>\d*)\]|:(?P<count>\d+))?")
_DATASET = re.compile(r"(?P<name>[\w.-]+(?:/[\w.-]+)?)(?:@(?P<revision>[^:#]+))?(?::(?P<config>[^#]+))?")


Kind = Literal["file", "folder", "builtin", "hub"]


@dataclass(frozen=True)
class Source:
    """A parsed SPEC.

    Attributes:
        split: Split of a dataset, also of saved or cloned ones.
        stop: Row after the last; None for all.
        column: Column of the prompts; None to detect it (`job.data.columns`).
        conversations: Whether the column holds conversations; their prompts are the users' first messages.
    """

    kind: Kind
    name: str
    revision: str | None
    config: str | None
    split: str
    start: int
    stop: int | None
    column: str | None
    conversations: bool = False

    @property
    def path(self) -> Path:
        """Path of a local or built-in source."""
        return _builtin_files()[self.name] if self.kind == "builtin" else Path(self.name)

    def describe(self) -> str:
        """Describe the parsed SPEC in words."""
        rows = f"rows {self.start} to {self.stop - 1}" if self.stop is not None else f"all rows from {self.start}"
        column = f"column {self.column}" if self.column else "the column of prompts"
        column += " (what users say first)" if self.conversations else ""
        if self.kind == "hub":
            at = f" at {self.revision}" if self.revision else ""
            config = f", configuration {self.config}" if self.config else ""
            return f"Hub dataset {self.name}{at}{config}, split {self.split}, {rows}, {column}"
        if self.kind == "builtin":
            return f"built-in prompts {self.name}, {rows}, {column}"
        config = f", configuration {self.config}" if self.config else ""
        plain = self.kind == "file" and Path(self.name).suffix.lower() in ("", ".txt")
        return f"{self.kind} {self.name}{config}, {rows}" + ("" if plain else f", {column}")


def parse_source(settings: PromptSettings) -> Source:
    """Parse a prompt set's SPEC; the set's own keys override its parts. Raises UsageError if it is malformed."""
    base, fragment = (settings.spec, "") if Path(settings.spec).exists() else _cut(settings.spec)
    split, _, column = fragment.partition("/")
    split = settings.split or split or DEFAULT_SPLIT
    matched = _SPLIT.fullmatch(split)
    if matched is None:
        raise UsageError(
            f"{split!r} of {settings.spec} is not a split that can be streamed",
            remedy='write e.g. "train[:400]" or train:400',
        )
    start, stop = int(matched["start"] or 0), matched["count"] or matched["stop"]
    if stop and int(stop) <= start:
        raise UsageError(f"{split!r} of {settings.spec} is empty", remedy="give an end greater than the start")
    kind, name, revision, config = _locate(base)
    return Source(
        kind=kind,
        name=name,
        revision=settings.revision or revision,
        config=settings.config or config,
        split=matched["name"],
        start=start,
        stop=int(stop) if stop else None,
        column=settings.column or column or None,
    )


def _cut(spec: str) -> tuple[str, str]:
    base, _, fragment = spec.rpartition("#") if "#" in spec else (spec, "", "")
    return base, fragment


def _builtin_files() -> dict[str, Path]:
    """Return the files of built-in prompts by name."""
    folder = Path(str(resources.files("job.data").joinpath("builtin")))
    return {path.stem: path for path in sorted(folder.glob("*.tsv"))}


def _locate(base: str) -> tuple[Kind, str, str | None, str | None]:
    """Return kind, name, revision and configuration of a SPEC without its fragment."""
    if base.startswith(BUILTIN):
        name = base.removeprefix(BUILTIN)
        if name not in _builtin_files():
            raise UsageError(f"there are no built-in prompts {name!r}", remedy=f"choose {', '.join(_builtin_files())}")
        return "builtin", name, None, None
    path = Path(base).expanduser()
    if path.is_dir():
        return "folder", str(path), None, None
    folder, colon, config = base.rpartition(":")
    # Only if unambiguous: user/set:en is on the Hub, whatever folders exist.
    if colon and config and base.startswith(_PATHS) and not path.exists() and Path(folder).expanduser().is_dir():
        return "folder", str(Path(folder).expanduser()), None, config
    matched = _DATASET.fullmatch(base)
    if path.exists() or path.suffix.lower() in SUFFIXES or base.startswith(_PATHS) or matched is None:
        return "file", str(path), None, None
    return "hub", matched["name"], matched["revision"], matched["config"]


def source_identity(settings: PromptSettings) -> dict[str, Any]:
    """Return a prompt set's part of a job's identity: files by content. Raises ImpossibleJobError."""
    source = parse_source(settings)
    described = named_identity(settings)
    if source.kind == "hub":
        return described
    digest = hashlib.sha256()
    path = source.path
    with readable(path):
        files = folder_files(path, source.split, source.config) if source.kind == "folder" else [path]
        for file in files:
            with file.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
    return {**described, "sha256": digest.hexdigest()}


def named_identity(settings: PromptSettings) -> dict[str, Any]:
    """Return a prompt set's part of a job's identity without reading files; local ones have an empty hash."""
    source = parse_source(settings)
    rest = settings.model_dump(include={"prefix", "suffix", "system_prompt", "max_characters"})
    described = {"split": source.split, "start": source.start, "stop": source.stop, "column": source.column, **rest}
    if source.kind == "hub":
        return {"dataset": source.name, "revision": source.revision, "config": source.config, **described}
    # Absent from jobs of former versions.
    config = {} if source.config is None else {"config": source.config}
    name = {"builtin": source.name} if source.kind == "builtin" else {}
    return {"sha256": "", **name, **config, **described}


@dataclass(frozen=True)
class Pin:
    """A dataset's commit, and whether the dataset is public."""

    commit: str
    public: bool


def resolve_commit(source: Source, report: Callable[[str], None]) -> Pin | None:
    """Return a dataset revision's current commit; None offline and for local sources. Raises JobError."""
    if source.kind != "hub" or is_offline():
        return None
    from huggingface_hub import HfApi

    def call() -> Pin:
        info = HfApi().dataset_info(source.name, revision=source.revision)
        return Pin(str(info.sha), info.private is False)

    return with_retries(call, f"dataset {source.name}", report)


class TextReader:
    """Reads a source's texts once; of a Hub dataset it fetches only what is read."""

    def __init__(self, source: Source, commit: str | None, report: Callable[[str], None]) -> None:
        """Take a source and its dataset's commit; `report` receives every retry."""
        self._source, self._commit, self._report = source, commit, report
        self._columns = ColumnTexts(source.name, source.split, source.column)

    @property
    def described(self) -> Source:
        """The source, with its detected column once read."""
        column = self._columns.column or self._source.column
        return replace(self._source, column=column, conversations=self._columns.conversations)

    def __iter__(self) -> Iterator[RowText]:
        return self._columns.texts(self._rows())

    def _rows(self) -> Iterator[Row]:
        source = self._source
        rows = hub_rows(source, self._commit, self._report) if source.kind == "hub" else self._local_rows()
        for count, row in enumerate(rows):
            if source.stop is None and count >= MOST_ROWS:
                raise UsageError(
                    f"{source.name} has more than {MOST_ROWS} rows",
                    remedy=f'give a slice, e.g. "{source.split}[:400]"',
                )
            yield row

    def _local_rows(self) -> Iterator[Row]:
        source = self._source
        path = source.path
        with readable(path):
            if source.kind == "folder" and (unread := left_out(path)):
                self._report(f"warning: {path}: not read: {', '.join(unread)}; to read a file, name it")
            rows = folder_rows(path, source.split, source.config) if source.kind == "folder" else file_rows(path)
            yield from itertools.islice(rows, source.start, source.stop)


def read_texts(source: Source, commit: str | None, report: Callable[[str], None]) -> Iterator[str]:
    """Yield a source's texts, skipping rows without; `report` receives every retry. Raises JobError."""
    return (row.text for row in TextReader(source, commit, report) if row.text is not None)
