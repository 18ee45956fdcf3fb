"""Stream rows of Hub datasets, with errors of `datasets` in plain words."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from job.data.files import Row
from job.errors import ImpossibleJobError, JobError, MachineError, in_one_line
from job.system.hub_client import explained, is_offline, not_granted, with_retries

if TYPE_CHECKING:
    from job.data.sources import Source

# Bytes fetched and parsed at a time. The library's 5 MiB and 10 MiB take 26 MB for 200 rows of C4.
_BLOCK_BYTES, _CHUNK_BYTES = 1 << 18, 1 << 20
# Branch in which the Hub keeps its own parquet conversions.
_CONVERTED = "refs/convert/parquet"
_MESSAGE_CHARACTERS = 300


def hub_rows(source: Source, commit: str | None, report: Callable[[str], None]) -> Iterator[Row]:
    """Stream a dataset's rows at a commit, retrying from the current row. Raises ImpossibleJobError or MachineError."""
    done = failed_at = 0
    while True:
        try:
            stream = with_retries(functools.partial(_opened, source, commit, done), f"dataset {source.name}", report)
            for cells in stream:
                done += 1
                yield Row(f"row {source.start + done - 1}", cells)
            return
        except Exception as error:
            known = _explained(error, source)
            if not isinstance(known, MachineError) or done == failed_at:
                raise known from error
            failed_at = done
            report(f"{known}; continuing from row {source.start + done}")


def _opened(source: Source, commit: str | None, done: int) -> Iterator[dict[str, Any]]:
    """Return an iterator over the rows after those done, with its first row already fetched."""
    import datasets

    datasets.disable_progress_bars()
    try:
        if is_offline():
            # Only a cache prepared by `datasets` is available, which does not stream.
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


def _explained(error: Exception, source: Source) -> JobError:
    import datasets

    if isinstance(error, JobError):
        return error
    text = in_one_line(error, _MESSAGE_CHARACTERS)
    if isinstance(error, datasets.exceptions.DatasetNotFoundError) and "gated" in text:
        return not_granted(f"dataset {source.name}")
    if isinstance(error, datasets.exceptions.DatasetNotFoundError):
        return ImpossibleJobError(
            f"dataset {source.name} is not on the Hub, or this token may not read it: {text}",
            remedy="check the name; for a private or gated dataset, set an HF_TOKEN that may read it",
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
    known = explained(error, f"dataset {source.name}")
    if isinstance(known, JobError):
        return known
    return _of_this_machine(error, source, text) or _unreadable(error, source, text)


def _of_this_machine(error: Exception, source: Source, text: str) -> MachineError | None:
    """Return the error for a failure of disk, memory or network, or None."""
    if isinstance(error, MemoryError):
        return MachineError(f"there is not enough memory to read dataset {source.name}", remedy="free memory")
    if type(error).__module__.startswith("aiohttp"):
        return MachineError(f"dataset {source.name} cannot be reached: {text}", remedy="check the network")
    if isinstance(error, OSError) and error.errno is not None and not isinstance(error, FileNotFoundError):
        return MachineError(
            f"dataset {source.name} cannot be cached: {error.strerror or text}",
            remedy="free disk space, or set HF_HOME to a writable folder",
        )
    return None


def _unreadable(error: Exception, source: Source, text: str) -> ImpossibleJobError:
    import datasets
    from datasets.table import CastError

    if "scripts are no longer supported" in text:
        return ImpossibleJobError(
            f"dataset {source.name} needs a loading script, which is not run ({text})",
            remedy=f"use the Hub's parquet conversion: {source.name}@{_CONVERTED}#{source.split}",
        )
    if isinstance(error, datasets.exceptions.DataFilesNotFoundError | datasets.data_files.EmptyDatasetError):
        return ImpossibleJobError(
            f"dataset {source.name} has no readable files: {text}", remedy="check the name and the revision"
        )
    if isinstance(error, datasets.exceptions.DatasetGenerationCastError | CastError):
        return ImpossibleJobError(
            f"the files of dataset {source.name} have different columns: {text}",
            remedy="download it and give one of its files",
        )
    return ImpossibleJobError(
        f"dataset {source.name} cannot be read: {type(error).__name__}: {text}",
        remedy=f"try {source.name}@{_CONVERTED}, or download it and give one of its files",
    )
