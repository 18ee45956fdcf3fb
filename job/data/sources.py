"""Where prompts come from: files, folders, saved datasets and datasets on the Hub, streamed row by row.

A SPEC is a file or folder or ``DATASET[@REV][:CONFIG]``, either followed by ``#SPLIT[/COLUMN]``; SPLIT is
``train``, ``train[:400]``, ``train[100:200]`` or, without characters that shells know, ``train:400``.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from job.config.schema import PromptSettings
from job.errors import ImpossibleJobError, JobError, MachineError, UsageError
from job.system.hub_client import explained, is_offline, not_granted, patiently

SUFFIXES = (".txt", ".jsonl", ".parquet")
DEFAULT_SPLIT, DEFAULT_COLUMN = "train", "text"
# More rows than anyone needs: a split without an end is then an oversight, and C4 has 365 million.
MOST_ROWS = 20_000
# What a stream fetches and parses at a time. The library's own 5 MiB and 10 MiB make 26 MB of 200 rows of C4.
_BLOCK_BYTES, _CHUNK_BYTES = 1 << 18, 1 << 20
_SPLIT = re.compile(r"(?P<name>[\w.-]+)(?:\[(?P<start>\d*):(?P<stop>\d*)\]|:(?P<count>\d+))?")
_DATASET = re.compile(r"(?P<name>[\w.-]+(?:/[\w.-]+)?)(?:@(?P<revision>[^:#]+))?(?::(?P<config>[^#]+))?")


@dataclass(frozen=True)
class Source:
    """A SPEC as it was understood.

    Attributes:
        kind: A file, a folder or a dataset on the Hub.
        name: The path or the dataset's name.
        revision: Branch, tag or commit of a dataset.
        config: Configuration of a dataset.
        split: Split of a dataset or saved dataset.
        start: First row.
        stop: Row after the last; None for all.
        column: The column that holds the prompts; None for "text".
    """

    kind: Literal["file", "folder", "hub"]
    name: str
    revision: str | None
    config: str | None
    split: str
    start: int
    stop: int | None
    column: str | None

    def describe(self) -> str:
        """Return in words how the SPEC was understood."""
        rows = f"rows {self.start} to {self.stop - 1}" if self.stop is not None else f"all rows from {self.start} on"
        column = f"column {self.column or DEFAULT_COLUMN}"
        if self.kind == "hub":
            at = f" at {self.revision}" if self.revision else ""
            config = f", configuration {self.config}" if self.config else ""
            return f"Hub dataset {self.name}{at}{config}, split {self.split}, {rows}, {column}"
        return f"{self.kind} {self.name}, {rows}" + ("" if self.name.endswith(".txt") else f", {column}")


def parse_source(settings: PromptSettings) -> Source:
    """Return where a prompt set's SPEC points to; the set's own keys override the SPEC's parts.

    Raises:
        UsageError: The SPEC is malformed.
    """
    base, fragment = (settings.spec, "") if Path(settings.spec).exists() else _cut(settings.spec)
    split, _, column = fragment.partition("/")
    split = settings.split or split or DEFAULT_SPLIT
    matched = _SPLIT.fullmatch(split)
    if matched is None:
        raise UsageError(
            f"{split!r} of {settings.spec} is no split that can be streamed",
            remedy='write e.g. "train[:400]" or train:400',
        )
    start, stop = int(matched["start"] or 0), matched["count"] or matched["stop"]
    if stop and int(stop) <= start:
        raise UsageError(f"{split!r} of {settings.spec} is empty", remedy="let its end lie behind its start")
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


def _locate(base: str) -> tuple[Literal["file", "folder", "hub"], str, str | None, str | None]:
    """Return kind, name, revision and configuration of a SPEC without its fragment."""
    path = Path(base).expanduser()
    if path.is_dir():
        return "folder", str(path), None, None
    matched = _DATASET.fullmatch(base)
    if path.exists() or path.suffix in SUFFIXES or base.startswith(("/", "./", "../", "~")) or matched is None:
        return "file", str(path), None, None
    return "hub", matched["name"], matched["revision"], matched["config"]


def source_identity(settings: PromptSettings) -> dict[str, Any]:
    """Return a prompt set as part of a job's identity: files by content, datasets as they were named.

    Raises:
        ImpossibleJobError: A file cannot be read.
    """
    source = parse_source(settings)
    described = named_identity(settings)
    if source.kind == "hub":
        return described
    digest = hashlib.sha256()
    with _readable(source.name):
        for file in _files(source):
            with file.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
    return {**described, "sha256": digest.hexdigest()}


def named_identity(settings: PromptSettings) -> dict[str, Any]:
    """Return a prompt set as part of a job's identity; no file is read, and the hash of local ones is empty."""
    source = parse_source(settings)
    rest = settings.model_dump(include={"prefix", "suffix", "system_prompt", "max_characters"})
    described = {"split": source.split, "start": source.start, "stop": source.stop, "column": source.column, **rest}
    if source.kind == "hub":
        return {"dataset": source.name, "revision": source.revision, "config": source.config, **described}
    return {"sha256": "", **described}


@dataclass(frozen=True)
class Pin:
    """A dataset's commit, and whether everybody may see the dataset."""

    commit: str
    public: bool


def resolve_commit(source: Source, report: Callable[[str], None]) -> Pin | None:
    """Return the commit that a dataset's revision points to now; None offline and for local sources.

    Raises:
        JobError: There is no such dataset or revision, or the Hub cannot be reached.
    """
    if source.kind != "hub" or is_offline():
        return None
    from huggingface_hub import HfApi

    def call() -> Pin:
        info = HfApi().dataset_info(source.name, revision=source.revision)
        return Pin(str(info.sha), info.private is False)

    return patiently(call, f"dataset {source.name}", report)


def read_texts(source: Source, commit: str | None, report: Callable[[str], None]) -> Iterator[str]:
    """Yield the texts of a source's rows; of a dataset on the Hub no more is fetched than that takes.

    Args:
        source: The source.
        commit: The commit that a dataset is read at.
        report: Told of every failure that is tried again.

    Raises:
        JobError: The source cannot be read, or does not have the configuration, split or column.
    """
    rows = _hub_rows(source, commit, report) if source.kind == "hub" else _local_rows(source)
    for count, row in enumerate(rows):
        if source.stop is None and count >= MOST_ROWS:
            raise UsageError(
                f"{source.name} has more than {MOST_ROWS} rows", remedy=f'give a slice, e.g. "{source.split}[:400]"'
            )
        yield _text(source, row)


def _text(source: Source, row: dict[str, Any]) -> str:
    column = source.column or DEFAULT_COLUMN
    value = row.get(column)
    if isinstance(value, str):
        return value
    texts = ", ".join(name for name, cell in row.items() if isinstance(cell, str)) or "none"
    problem = f"holds {type(value).__name__}, not text," if column in row else "does not exist"
    raise ImpossibleJobError(
        f"column {column} of {source.name} {problem} among the columns {', '.join(row)}",
        remedy=f"name one that holds text ({texts}), e.g. #{source.split}/COLUMN",
    )


# --- local --------------------------------------------------------------------------------------------


class _readable:  # noqa: N801 - reads as the statement it is: with _readable(name)
    """Turns what the file system says into the job's own errors."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _trace: object) -> None:
        if isinstance(error, FileNotFoundError):
            raise ImpossibleJobError(f"there is no prompt file {self._name}", remedy="check its path") from None
        if isinstance(error, UnicodeDecodeError):
            raise ImpossibleJobError(
                f"the prompt file {self._name} is not UTF-8 text", remedy="give a text file, one prompt a line"
            ) from None
        if isinstance(error, OSError):
            raise ImpossibleJobError(
                f"cannot read the prompt file {self._name}: {error.strerror or error}", remedy="check its path"
            ) from error


def _files(source: Source) -> list[Path]:
    """Return the files of a local source in the order they are read."""
    path = Path(source.name)
    if source.kind == "file":
        return [path]
    if _is_saved(path):
        return sorted(file for file in path.rglob("*") if file.is_file())
    files = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES)
    if not files:
        raise ImpossibleJobError(f"the folder {path} holds no prompts", remedy=f"give {', '.join(SUFFIXES)} files")
    return files


def _is_saved(folder: Path) -> bool:
    return any((folder / name).exists() for name in ("dataset_info.json", "dataset_dict.json", "state.json"))


def _local_rows(source: Source) -> Iterator[dict[str, Any]]:
    with _readable(source.name):
        if source.kind == "folder" and _is_saved(Path(source.name)):
            rows: Iterator[dict[str, Any]] = _saved_rows(source)
        else:
            rows = itertools.chain.from_iterable(map(_file_rows, _files(source)))
        yield from itertools.islice(rows, source.start, source.stop)


def _file_rows(path: Path) -> Iterator[dict[str, Any]]:
    if path.suffix == ".jsonl":
        yield from _json_rows(path)
    elif path.suffix == ".parquet":
        yield from _parquet_rows(path)
    else:
        for line in path.read_text("utf-8-sig").split("\n"):
            yield {DEFAULT_COLUMN: line}


def _json_rows(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ImpossibleJobError(
                    f"{path}, line {number}: {error.msg}", remedy="write one object a line"
                ) from None
            if not isinstance(row, dict):
                raise ImpossibleJobError(f"{path}, line {number} is no object", remedy='write e.g. {"text": "..."}')
            yield row


def _parquet_rows(path: Path) -> Iterator[dict[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1000):
                yield from batch.to_pylist()
    except pyarrow.ArrowInvalid as error:
        raise ImpossibleJobError(f"{path} is not a parquet file: {error}", remedy="obtain an undamaged copy") from error


def _saved_rows(source: Source) -> Iterator[dict[str, Any]]:
    import datasets

    saved = datasets.load_from_disk(source.name)
    if isinstance(saved, datasets.DatasetDict):
        if source.split not in saved:
            raise ImpossibleJobError(
                f"{source.name} has no split {source.split}", remedy=f"choose from {', '.join(saved)} as #SPLIT"
            )
        saved = saved[source.split]
    yield from saved


# --- the Hub ------------------------------------------------------------------------------------------


def _hub_rows(source: Source, commit: str | None, report: Callable[[str], None]) -> Iterator[dict[str, Any]]:
    """Stream a dataset's rows; what fails for a while is tried again, from the row it had come to."""
    done = failed_at = 0
    while True:
        try:
            stream = patiently(functools.partial(_opened, source, commit, done), f"dataset {source.name}", report)
            for row in stream:
                done += 1
                yield row
            return
        except Exception as error:
            known = _explained(error, source)
            if not isinstance(known, MachineError) or done == failed_at:
                raise known from error
            failed_at = done
            report(f"{known}; going on from row {source.start + done}")


def _opened(source: Source, commit: str | None, done: int) -> Iterator[dict[str, Any]]:
    """Return an iterator over a dataset's rows behind those that are done, its first row fetched already."""
    import datasets

    datasets.disable_progress_bars()
    try:
        if is_offline():
            # What `datasets` itself has prepared is all there is, and that is no stream.
            loaded = datasets.load_dataset(source.name, source.config, split=source.split)
            return itertools.islice(iter(loaded), source.start + done, source.stop)
        builder = datasets.load_dataset_builder(
            source.name,
            source.config,
            revision=commit or source.revision,
            storage_options={"hf": {"block_size": _BLOCK_BYTES}},
        )
        if hasattr(builder.config, "chunksize"):
            builder.config.chunksize = min(builder.config.chunksize, _CHUNK_BYTES)
        stream = builder.as_streaming_dataset(split=source.split)
        stream = stream.skip(source.start + done)
        rows = iter(stream if source.stop is None else stream.take(source.stop - source.start - done))
        first = list(itertools.islice(rows, 1))
    except Exception as error:
        raise _explained(error, source) from error
    return itertools.chain(first, rows)


def _explained(error: Exception, source: Source) -> Exception:
    """Return what `datasets` raised in plain words."""
    import datasets

    if isinstance(error, JobError):
        return error
    text = " ".join(str(error).split())
    if isinstance(error, datasets.exceptions.DatasetNotFoundError) and "gated" in text:
        return not_granted(f"dataset {source.name}")
    if isinstance(error, datasets.exceptions.DatasetNotFoundError):
        return ImpossibleJobError(
            f"dataset {source.name} is not on the Hub, or not for this token: {text}",
            remedy="check the name; a private or gated one needs a HF_TOKEN that may read it",
        )
    if isinstance(error, ValueError) and "onfig" in text:
        return ImpossibleJobError(
            f"dataset {source.name} needs a configuration: {text}",
            remedy=f"name it: {source.name}:CONFIG#{source.split}",
        )
    if isinstance(error, ValueError) and "split" in text.lower():
        return ImpossibleJobError(
            f"dataset {source.name} has no split {source.split}: {text}", remedy="name one as #SPLIT"
        )
    return explained(error, f"dataset {source.name}")
