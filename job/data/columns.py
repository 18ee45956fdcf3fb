"""Find the column that holds prompts, and its text in each row."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from job.data.files import Row
from job.errors import ImpossibleJobError, one_line
from job.records.scorecard import COLUMNS, LONGEST_GROUP

# Names of prompt columns, by priority. Those of conversations come before "text", which often is one in a template.
_OF_CONVERSATIONS = ("messages", "conversations", "conversation")
_OF_TEXTS = ("text", "instruction", "question", "goal", "input", "query")
PROMPT_COLUMNS = ("prompt", *_OF_CONVERSATIONS, *_OF_TEXTS)
# The roles of users, in the formats of OpenAI and ShareGPT.
_USERS = ("user", "human")
# Rows sampled to detect the column.
_SAMPLE = 100
# A name with this many words is a prompt: the file has no header.
_WORDS_OF_A_PROMPT = 4


@dataclass(frozen=True)
class RowText:
    """A row's text; `place` is e.g. "line 17 of b.jsonl", and `repaired` if lone surrogates became U+FFFD.

    `groups` are the row's category and language, where it has such columns.
    """

    place: str
    text: str | None
    repaired: bool = False
    groups: Mapping[str, str] = field(default_factory=dict)


class ColumnTexts:
    """Reads the texts of a source from one column.

    `column` is None before a row with columns has been read, and for plain text. `conversations` tells whether a row
    read so far was one.
    """

    def __init__(self, source: str, split: str, column: str | None) -> None:
        """Take the source's name and split for messages, and the requested column; None detects it."""
        self.column: str | None = None
        self.conversations = False
        self._source, self._split, self._given = source, split, column

    def texts(self, rows: Iterable[Row]) -> Iterator[RowText]:
        """Yield every row's text. Raises ImpossibleJobError for a missing or ambiguous column, or other values."""
        source = iter(rows)
        sample = list(itertools.islice(source, _SAMPLE))
        tables = [row for row in sample if isinstance(row.cells, dict)]
        if tables:
            self.column = self._found(tables)
        first = sample[0].file if sample else ""
        many = False
        lacking: dict[str, Row] = {}  # by file, its first row if no row has had the column
        having: set[str] = set()
        for row in itertools.chain(sample, source):
            many = many or row.file != first
            if isinstance(row.cells, str):
                yield self._text(row, row.cells, many, {})
                continue
            if self.column is None:  # tables behind plain text, in one folder
                self.column = self._found([row])
            if self.column in row.cells:
                having.add(row.file)
            else:
                lacking.setdefault(row.file, row)
            yield self._text(row, row.cells.get(self.column), many, self._groups(row.cells))
        for file, row in lacking.items():
            if file not in having:
                raise self._absent([row], file)

    def _found(self, tables: list[Row]) -> str:
        names = _names(tables)
        if self._given is not None:
            if self._given not in names:
                raise self._absent(tables, tables[0].file)
            return self._given
        texts = _text_columns(tables)
        plain = {name.strip().lower(): name for name in reversed([*texts, *_conversation_columns(tables)])}
        for name in PROMPT_COLUMNS:
            if name in plain:
                return plain[name]
        if len(texts) != 1:
            raise ImpossibleJobError(
                f"{self._source} has {'several columns' if texts else 'no column'} of text, and none is named "
                f"{', '.join(PROMPT_COLUMNS[:-1])} or {PROMPT_COLUMNS[-1]}, among the columns {', '.join(names)}",
                remedy=self._name_one(texts),
            )
        if len(texts[0].split()) >= _WORDS_OF_A_PROMPT:
            raise ImpossibleJobError(
                f"the first line of {self._source} names no columns: {texts[0][:80]!r}",
                remedy="put a first line above it: prompt",
            )
        return texts[0]

    def _groups(self, cells: Mapping[str, Any]) -> dict[str, str]:
        named = {name.strip().lower(): cell for name, cell in cells.items() if name != self.column}
        texts = {column: named[column] for column in COLUMNS if isinstance(named.get(column), str)}
        groups = {column: one_line(text)[:LONGEST_GROUP].strip() for column, text in texts.items()}
        return {column: group for column, group in groups.items() if group}

    def _text(self, row: Row, value: Any, many: bool, groups: Mapping[str, str]) -> RowText:
        place = f"{row.place} of {row.file}" if many and row.file else row.place
        if value is None or value != value:  # pandas writes missing values as NaN
            return RowText(place, None)
        if _is_conversation(value):
            self.conversations = True
            value = _request(value)
            if value is None:
                raise ImpossibleJobError(
                    f"column {self.column} of {self._source} holds a conversation without a user's text, in {place}",
                    remedy='leave it out, or write e.g. [{"role": "user", "content": "..."}]',
                )
        if not isinstance(value, str):
            raise ImpossibleJobError(
                f"column {self.column} of {self._source} holds {type(value).__name__}, not text, in {place}, "
                f"among the columns {', '.join(row.cells)}",
                remedy=self._name_one(_text_columns([row])),
            )
        whole = value.encode("utf-16", "surrogatepass").decode("utf-16", "replace") if _has_halves(value) else value
        return RowText(place, whole, whole != value, groups)

    def _absent(self, rows: list[Row], file: str) -> ImpossibleJobError:
        where = f"{self._source} ({file})" if file and not self._source.endswith(file) else self._source
        return ImpossibleJobError(
            f"column {self._given or self.column} of {where} does not exist among the columns "
            f"{', '.join(_names(rows)) or 'of an empty row'}",
            remedy=self._name_one(_text_columns(rows)),
        )

    def _name_one(self, texts: list[str]) -> str:
        return f"name one that holds text ({', '.join(texts) or 'none'}), e.g. #{self._split}/COLUMN"


def _names(rows: list[Row]) -> list[str]:
    return list(dict.fromkeys(name for row in rows if isinstance(row.cells, dict) for name in row.cells))


def _text_columns(rows: list[Row]) -> list[str]:
    """Return the columns in which a row holds non-numeric text."""
    found = dict.fromkeys(
        name
        for row in rows
        if isinstance(row.cells, dict)
        for name, cell in row.cells.items()
        if isinstance(cell, str) and cell.strip() and not _is_number(cell)
    )
    return list(found)


def _conversation_columns(tables: list[Row]) -> list[str]:
    """Return the columns in which a row holds a conversation with a user's text."""
    return [
        name
        for name in _names(tables)
        if any(isinstance(row.cells, dict) and _request(row.cells.get(name)) is not None for row in tables)
    ]


def _is_conversation(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(_speaker(turn) is not None for turn in value)


def _speaker(turn: Any) -> str | None:
    who = (turn.get("role") or turn.get("from")) if isinstance(turn, dict) else None
    return who if isinstance(who, str) else None


def _request(value: Any) -> str | None:
    """Return what the user says first in a conversation; None if it is no conversation or has no such text."""
    if not _is_conversation(value):
        return None
    turn: dict[str, Any] = next((turn for turn in value if _speaker(turn) in _USERS), {})
    said = turn["content"] if turn.get("content") is not None else turn.get("value")
    if isinstance(said, list):  # parts; with an image among them the text is not the whole request
        parts = [part.get("text") if isinstance(part, dict) else None for part in said]
        texts = [part for part in parts if isinstance(part, str)]
        return "".join(texts) if len(texts) == len(parts) > 0 else None
    return said if isinstance(said, str) else None


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _has_halves(text: str) -> bool:
    """Return whether a text has surrogates, which UTF-8 cannot encode."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False
