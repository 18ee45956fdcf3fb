"""The header of a safetensors file: which tensors it holds, and where."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open

from job.errors import in_one_line
from job.model.user_files import damaged

# The library's own limit of a header.
_MOST_BYTES = 100_000_000


@dataclass(frozen=True)
class TensorEntry:
    """Where a tensor stands in a shard.

    Attributes:
        dtype: Its type as safetensors names it.
        shape: Its shape.
        start: Where its bytes begin in the file.
        size: How many they are.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int


def read_header(file: Path) -> dict[str, TensorEntry]:
    """Return a safetensors file's tensors by name, checked by its library. Raises ImpossibleJobError if damaged."""
    size = file.stat().st_size
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if length > _MOST_BYTES:
                raise ValueError(f"its header has {length} bytes, more than {_MOST_BYTES}")
            header = json.loads(stream.read(min(length, size)))
        header.pop("__metadata__", None)
        entries = {}
        for name, told in header.items():
            begin, end = map(int, told["data_offsets"])
            shape = tuple(int(side) for side in told["shape"])
            entries[name] = TensorEntry(str(told["dtype"]), shape, 8 + length + begin, end - begin)
        wanted = max((entry.start + entry.size for entry in entries.values()), default=0)
        if size < wanted:
            raise ValueError(f"it has {size} bytes, but its header describes {wanted}")
        with safe_open(file, framework="numpy"):
            pass  # which checks that the tensors fill the file, each with the bytes that its shape asks for
    except Exception as error:  # safetensors raises its own type and several built-in ones
        raise damaged(file, in_one_line(error), "obtain an undamaged copy of the model") from error
    return entries


def header_bytes(file: Path) -> bytes:
    """Return the bytes before a safetensors file's first tensor."""
    with file.open("rb") as stream:
        length = stream.read(8)
        return length + stream.read(int.from_bytes(length, "little"))
