"""Turn library errors while reading a model's files into one line that names the file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from job.errors import ImpossibleJobError, explaining, in_one_line
from job.text.decoding import LFS_POINTER

_COPY = "obtain an undamaged copy"
# The largest tokenizer.json have some 40 MB.
_MOST_BYTES = 512 << 20


def damaged(file: Path, why: object, remedy: str = _COPY) -> ImpossibleJobError:
    """Return the error for a file that is not what its name says; a Git LFS pointer is named as one."""
    return _unfetched(file) if _is_pointer(file) else ImpossibleJobError(f"{file} is damaged: {why}", remedy=remedy)


def _is_pointer(file: Path) -> bool:
    try:
        with file.open("rb") as stream:
            return stream.read(len(LFS_POINTER)) == LFS_POINTER
    except OSError:
        return False


def _unfetched(file: Path) -> ImpossibleJobError:
    return ImpossibleJobError(
        f"{file} is a Git LFS pointer, not the file itself", remedy=f"run `git lfs pull` in {file.parent}"
    )


def reading(folder: Path, names: Sequence[str], what: str, remedy: str) -> AbstractContextManager[None]:
    """Within the block, turn whatever a library raises over a model's files into ImpossibleJobError.

    The first of `names` that is no text or no JSON is named alone. If each can be read by itself, `what` and `remedy`
    say what is wrong with the folder and what to do.
    """

    def explain(error: BaseException) -> ImpossibleJobError:
        present = [name for name in names if (folder / name).is_file()]
        for name in present:
            _require_readable(folder / name)
        files = ", ".join(present) or f"without {names[0]}"
        return ImpossibleJobError(f"{folder} {what} ({files}): {in_one_line(error)}", remedy=remedy)

    return explaining(explain)


def _require_readable(file: Path) -> None:
    """Refuse a file whose name says that it is text, or JSON with an object, and that is not."""
    if _is_pointer(file):
        raise _unfetched(file)
    if file.suffix == ".json":
        object_of(file)
    elif file.suffix in (".txt", ".jinja"):
        _text(file)


def object_of(file: Path) -> dict[str, Any]:
    """Return a JSON file's object: UTF-8, no byte order mark, as libraries want. Raises ImpossibleJobError."""
    try:
        found = json.loads(_text(file))
    except (ValueError, RecursionError) as error:
        raise damaged(file, error) from error
    if not isinstance(found, dict):
        raise damaged(file, "it does not hold a JSON object")
    return found


def _text(file: Path) -> str:
    try:
        if file.stat().st_size > _MOST_BYTES:
            raise ImpossibleJobError(f"{file} has more than {_MOST_BYTES >> 20} MiB", remedy=_COPY)
        return file.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ImpossibleJobError(f"{file} is not UTF-8 text", remedy="save it as UTF-8") from error
    except OSError as error:
        raise ImpossibleJobError(f"{file} cannot be read: {error.strerror or error}", remedy=_COPY) from error
