"""Rows of prompt files: text, CSV, TSV, JSON, JSON lines and parquet."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from job.errors import ImpossibleJobError, first_line
from job.text.decoding import LFS_POINTER, encoding_of

# Read in every folder; the second kind only without the first, as it may hold descriptions.
PLAIN = (".txt", ".jsonl", ".ndjson", ".parquet")
TABLES = (".csv", ".tsv", ".json")
SUFFIXES = (*PLAIN, *TABLES)
_START_BYTES = 4096
# A CSV field may hold a whole document; Python's limit is 128 KiB.
_LONGEST_FIELD = 1 << 24
_DELIMITERS = ",;\t|"


@dataclass(frozen=True)
class Row:
    """A row of a source.

    Attributes:
        place: Its position, e.g. "line 17".
        cells: Values by column; a plain-text line is the text itself.
    """

    place: str
    cells: str | dict[str, Any]
    file: str = ""


class readable:  # noqa: N801 - reads as the statement it is: with readable(path)
    """Turns errors of reading a file into the job's own."""

    def __init__(self, name: Path | str) -> None:
        self._name = name

    def __enter__(self) -> None:
        path = Path(self._name)
        # A pipe is empty when it is read again, and prompts are read at every start.
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise ImpossibleJobError(f"{path} is a pipe or a device, not a file", remedy="save the prompts to a file")

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _trace: object) -> None:
        if isinstance(error, FileNotFoundError):
            raise ImpossibleJobError(f"there is no prompt file {self._name}", remedy="check its path") from None
        if isinstance(error, UnicodeDecodeError):
            raise ImpossibleJobError(
                f"the prompt file {self._name} is not UTF-8 text{_undecodable_line(Path(self._name))}",
                remedy="save it as UTF-8, e.g. with iconv -f WINDOWS-1252 -t UTF-8",
            ) from None
        if isinstance(error, OSError):
            raise ImpossibleJobError(
                f"cannot read the prompt file {self._name}: {error.strerror or error}", remedy="check its path"
            ) from error


def _undecodable_line(path: Path) -> str:
    try:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                try:
                    line.decode()
                except UnicodeDecodeError:
                    return f" (line {number})"
    except OSError:
        pass
    return ""


def require_known(path: Path) -> None:
    """Raise ImpossibleJobError for an unknown suffix: other kinds read as text would give wrong prompts."""
    if path.suffix and path.suffix.lower() not in SUFFIXES:
        raise ImpossibleJobError(
            f"the prompt file {path} has an unsupported suffix: {path.suffix}",
            remedy=f"give {', '.join(SUFFIXES)}; name plain text with one prompt per line .txt",
        )


def file_rows(path: Path) -> Iterator[Row]:
    """Yield a file's rows, in the format of its suffix. Raises ImpossibleJobError."""
    require_known(path)
    with readable(path):
        _refuse_pointer(path)
        yield from _READERS.get(path.suffix.lower(), _text_rows)(path)


def _refuse_pointer(path: Path) -> None:
    with path.open("rb") as stream:
        start = stream.read(len(LFS_POINTER))
    if start == LFS_POINTER:
        raise ImpossibleJobError(
            f"{path} is a Git LFS pointer, not the file itself", remedy=f"run `git lfs pull` in {path.parent}"
        )


def _opened(path: Path, newline: str | None = None) -> io.TextIOWrapper:
    with path.open("rb") as stream:
        encoding = encoding_of(stream.read(_START_BYTES))
    return path.open(encoding=encoding, newline=newline)


def _text_rows(path: Path) -> Iterator[Row]:
    with _opened(path) as lines:
        for number, line in enumerate(lines, 1):
            yield Row(f"line {number}", line.removesuffix("\n"), path.name)


def _json_line_rows(path: Path) -> Iterator[Row]:
    with _opened(path) as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield Row(f"line {number}", _object(_parsed(line, f"{path}, line {number}"), path, number), path.name)


def _object(value: Any, path: Path, number: int) -> str | dict[str, Any]:
    if not isinstance(value, str | dict):
        raise ImpossibleJobError(f"{path}, line {number} is not an object", remedy='write e.g. {"text": "..."}')
    return value


def _parsed(text: str, where: str) -> Any:
    def distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        _require_distinct([name for name, _ in pairs], where)
        return dict(pairs)

    try:
        return json.loads(text, object_pairs_hook=distinct)
    except (ValueError, RecursionError) as error:
        why = error.msg if isinstance(error, json.JSONDecodeError) else first_line(error)
        raise ImpossibleJobError(f"{where}: {why}", remedy="correct it, or obtain an undamaged copy") from None


def _require_distinct(names: Iterable[str], where: str) -> None:
    """Raise ImpossibleJobError for a column that is named twice: which one holds the prompts cannot be known."""
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated:
        raise ImpossibleJobError(f"{where} names {repeated[0]!r} more than once", remedy="rename or remove one of them")


def _json_rows(path: Path) -> Iterator[Row]:
    """Yield the rows of a JSON file: an array, an object that holds one, columns, or misnamed JSON lines."""
    if _holds_lines(path):
        yield from _json_line_rows(path)
        return
    with _opened(path) as stream:
        rows = _array(_parsed(stream.read(), str(path)), path)
    for number, row in enumerate(rows):
        if row is not None and not isinstance(row, str | dict):
            raise ImpossibleJobError(
                f"{path}, row {number} is neither text nor an object", remedy='write e.g. [{"prompt": "..."}]'
            )
        yield Row(f"row {number}", {} if row is None else row, path.name)


def _holds_lines(path: Path) -> bool:
    """Return whether the first line is a complete object and others follow."""
    with _opened(path) as lines:
        filled = (line for line in lines if line.strip())
        first, more = next(filled, ""), next(filled, "")
    try:
        return bool(more) and isinstance(json.loads(first), dict)
    except (ValueError, RecursionError):
        return False


def _array(value: Any, path: Path) -> Iterable[Any]:
    if isinstance(value, list):
        return value
    if isinstance(value, dict):
        lists = {name: cells for name, cells in value.items() if isinstance(cells, list)}
        objects = [cells for cells in lists.values() if cells and all(isinstance(cell, dict) for cell in cells)]
        if len(objects) == 1:
            return objects[0]
        if lists and len(lists) == len(value) and len({len(cells) for cells in lists.values()}) == 1 and not objects:
            return [dict(zip(lists, row, strict=True)) for row in zip(*lists.values(), strict=True)]
        if any(isinstance(cell, str) for cell in value.values()) and not lists:
            return [value]
    names = f" (it is an object of {', '.join(list(value)[:10])})" if isinstance(value, dict) else ""
    raise ImpossibleJobError(
        f"{path} does not hold a list of prompts{names}", remedy='write an array, e.g. [{"prompt": "..."}]'
    )


def _csv_rows(path: Path) -> Iterator[Row]:
    yield from _separated_rows(path, None)


def _tsv_rows(path: Path) -> Iterator[Row]:
    yield from _separated_rows(path, "\t")


def _separated_rows(path: Path, delimiter: str | None) -> Iterator[Row]:
    csv.field_size_limit(_LONGEST_FIELD)
    with _opened(path, newline="") as stream:
        first = stream.readline()
        stream.seek(0)
        lines = csv.reader(stream, delimiter=delimiter or _delimiter(first), strict=True)
        try:
            names = next(lines, [])
            _require_distinct(filter(None, names), f"{path}, line 1")
            end = lines.line_num
            for cells in lines:
                line, end = end + 1, lines.line_num
                if not cells:  # a blank line
                    continue
                yield Row(f"line {line}", _by_column(names, cells, path, line), path.name)
        except csv.Error as error:
            raise ImpossibleJobError(
                f"{path}, line {lines.line_num}: {error}",
                remedy='put texts with quotes into quotes, and double each quote in them: "a ""word"""',
            ) from None


def _delimiter(header: str) -> str:
    return max(_DELIMITERS, key=header.count)


def _by_column(names: list[str], cells: list[str], path: Path, line: int) -> dict[str, Any]:
    if len(cells) > len(names):
        raise ImpossibleJobError(
            f"{path}, line {line} has {len(cells)} fields, and its first line names {len(names)}",
            remedy='put texts that hold the separator into quotes: "one, two"',
        )
    return dict(zip(names, [*cells, *[None] * (len(names) - len(cells))], strict=True))


def _parquet_rows(path: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            _require_distinct(file.schema_arrow.names, str(path))
            for batch in file.iter_batches(batch_size=1000):
                for cells in batch.to_pylist():
                    yield Row(f"row {number}", cells, path.name)
                    number += 1
    except UnicodeDecodeError:
        raise ImpossibleJobError(
            f"{path} has text after row {number} that is not UTF-8", remedy="write it again as UTF-8"
        ) from None
    except pyarrow.ArrowException as error:
        raise _no_parquet(path, error) from error
    except OSError as error:
        if error.errno is not None:
            raise
        raise _no_parquet(path, error) from error


def _no_parquet(path: Path, error: Exception) -> ImpossibleJobError:
    why = " ".join(str(error).split())
    return ImpossibleJobError(f"{path} is not a parquet file: {why}", remedy="obtain an undamaged copy")


_READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": _json_line_rows,
    ".ndjson": _json_line_rows,
    ".json": _json_rows,
    ".csv": _csv_rows,
    ".tsv": _tsv_rows,
    ".parquet": _parquet_rows,
}
