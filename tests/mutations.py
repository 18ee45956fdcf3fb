"""Changes of the files of a model folder, as disks, downloads, editors and programs leave them: from a seed."""

from __future__ import annotations

import codecs
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SAFETENSORS = ".safetensors"
HARDLY_READ = {"special_tokens_map.json", "added_tokens.json"}
Change = Callable[[bytes, random.Random], bytes]


@dataclass(frozen=True)
class Mutation:
    """What became of a file of a model folder.

    Attributes:
        file: Its name.
        name: The kind of change.
        values: It changed nothing but values of weights.
        harmless: The file means what it meant.
    """

    file: str
    name: str
    values: bool = False
    harmless: bool = False


def mutate(folder: Path, rng: random.Random) -> Mutation:
    """Change one file of a model folder; return how."""
    files = sorted(path for path in folder.iterdir() if path.is_file())
    (file,) = rng.choices(files, [1 if file.name in HARDLY_READ else 3 for file in files])
    kinds: dict[str, Change] = {**TEXT}
    if file.suffix == SAFETENSORS:
        kinds = {**WEIGHTS}
    elif file.suffix == ".json":
        kinds = {**TEXT, **JSON, **{f"{name} again": change for name, change in JSON.items()}}
    before = file.read_bytes()
    for _ in range(20):  # until it is another file
        name = rng.choice(sorted(kinds))
        after = kinds[name](before, rng)
        if after != before:
            break
    file.write_bytes(after)
    return Mutation(file.name, name, name in VALUES, name.removesuffix(" again") in HARMLESS)


# --- any file -------------------------------------------------------------------------------------------


def truncated(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(1, len(data))]


def flipped(data: bytes, rng: random.Random, start: int = 0, end: int | None = None) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8))):
        changed[rng.randrange(start, end or len(data))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def with_a_hole(data: bytes, rng: random.Random) -> bytes:
    start = rng.randrange(len(data))
    return data[:start] + data[start + rng.randrange(1, 40) :]


def with_zeros(data: bytes, rng: random.Random) -> bytes:
    start = rng.randrange(len(data))
    count = min(rng.randrange(1, 40), len(data) - start)
    return data[:start] + b"\0" * count + data[start + count :]


def with_a_part_twice(data: bytes, rng: random.Random) -> bytes:
    start = rng.randrange(len(data))
    return data[: start + rng.randrange(1, 40)] + data[start:]


TEXT: dict[str, Change] = {
    "empty": lambda data, rng: b"",
    "truncated": truncated,
    "flipped": flipped,
    "with a hole": with_a_hole,
    "with zeros": with_zeros,
    "with a part twice": with_a_part_twice,
    "with a BOM": lambda data, rng: codecs.BOM_UTF8 + data,
    "UTF-16": lambda data, rng: data.decode().encode("utf-16"),
    "with words after the end": lambda data, rng: data + b"\n<<<<<<< HEAD\n",
}

# --- JSON -----------------------------------------------------------------------------------------------

Place = tuple[Any, Any]  # an object or a list, and a key of it
OTHERS: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 7, 2.5, -1e-6, 10**6, 10**12, 10**30, 1e308, float("nan"), float("inf")),
    *("", "64", "none", "\ud83d", "x" * 5000, [], [1], ["a", None], [[]], {}, {"a": 1}, {"": None}),
)


def places(value: Any) -> list[Place]:
    """Return all keys of a JSON value, those of objects and lists within it included; few of long ones."""
    keys: list[Any] = list(value) if isinstance(value, dict) else list(range(len(value)))
    found = [(value, key) for key in keys[:40]]
    for key in keys[:40]:
        if isinstance(value[key], dict | list):
            found += places(value[key])
    return found


def at_a_place(change: Callable[[Any, Any, random.Random], None]) -> Change:
    def changed(data: bytes, rng: random.Random) -> bytes:
        value = json.loads(data)
        found = places(value)
        if not found:
            return data
        change(*rng.choice(found), rng)
        return json.dumps(value, indent=1).encode()

    return changed


def put(holder: Any, key: Any, rng: random.Random) -> None:
    holder[key] = rng.choice(OTHERS)


def delete(holder: Any, key: Any, rng: random.Random) -> None:
    del holder[key]


def negate(holder: Any, key: Any, rng: random.Random) -> None:
    if isinstance(holder[key], int | float):
        holder[key] = -holder[key]


def grow(holder: Any, key: Any, rng: random.Random) -> None:
    if isinstance(holder[key], int | float):
        holder[key] = holder[key] * rng.choice((2, 3, 10**9, 10**20)) + rng.choice((0, 1))


def rename(holder: Any, key: Any, rng: random.Random) -> None:
    if isinstance(holder, dict):
        holder[f"{key}_"] = holder.pop(key)


def exchange(holder: Any, key: Any, rng: random.Random) -> None:
    other = rng.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
    holder[key], holder[other] = holder[other], holder[key]


def nest(holder: Any, key: Any, rng: random.Random) -> None:
    holder[key] = {str(key): holder[key]} if rng.random() < 0.5 else [holder[key]]


def twice(data: bytes, rng: random.Random, other: bool = True) -> bytes:
    """Give an object the same key twice, with another value or the same."""
    value = json.loads(data)
    if not isinstance(value, dict) or not value:
        return data
    key = rng.choice(sorted(value))
    again = json.dumps(rng.choice(OTHERS) if other else value[key])
    return json.dumps(value).rstrip("}").encode() + f", {json.dumps(key)}: {again}}}".encode() if value else data


def otherwise_written(data: bytes, rng: random.Random) -> bytes:
    """Write the same with other spaces and escapes."""
    return json.dumps(json.loads(data), indent=rng.choice((None, 7)), ensure_ascii=True).encode() + b"\n\n"


JSON: dict[str, Change] = {
    "with another value": at_a_place(put),
    "without a key": at_a_place(delete),
    "with a negative number": at_a_place(negate),
    "with a larger number": at_a_place(grow),
    "with a renamed key": at_a_place(rename),
    "with two values exchanged": at_a_place(exchange),
    "with a nested value": at_a_place(nest),
    "with a key twice": twice,
    "otherwise written": otherwise_written,
    "another JSON value": lambda data, rng: json.dumps(rng.choice(OTHERS)).encode(),
    "nested without end": lambda data, rng: rng.choice((b"[", b'{"a":')) * 100_000,
}
HARMLESS = {"otherwise written"}

# --- weights --------------------------------------------------------------------------------------------


def header_of(data: bytes) -> bytes:
    return data[8 : 8 + int.from_bytes(data[:8], "little")]


def of_the_header(change: Change) -> Change:
    """Change the header of a safetensors file, and its stated length with it."""

    def changed(data: bytes, rng: random.Random) -> bytes:
        header = header_of(data)
        new = change(header, rng)
        new += b" " * (-len(new) % 8)
        return len(new).to_bytes(8, "little") + new + data[8 + len(header) :]

    return changed


def values_flipped(data: bytes, rng: random.Random) -> bytes:
    return flipped(data, rng, 8 + len(header_of(data)))


def with_another_length(data: bytes, rng: random.Random) -> bytes:
    return rng.choice((0, 1, 7, len(data), len(data) * 2, 2**40, 2**64 - 1)).to_bytes(8, "little") + data[8:]


def not_finite(data: bytes, rng: random.Random) -> bytes:
    """Make one number of 32 bits NaN or infinite."""
    first = 8 + len(header_of(data))
    start = first + 4 * rng.randrange((len(data) - first) // 4)
    return data[:start] + rng.choice((b"\0\0\xc0\x7f", b"\0\0\x80\xff")) + data[start + 4 :]


WEIGHTS: dict[str, Change] = {
    **{name: TEXT[name] for name in ("empty", "truncated", "with words after the end", "with a hole")},
    "with values flipped": values_flipped,
    "with its header flipped": lambda data, rng: flipped(data, rng, 0, 8 + len(header_of(data))),
    "with another length": with_another_length,
    "not finite": not_finite,
    **{f"header {name}": of_the_header(change) for name, change in JSON.items()},
    "header truncated": of_the_header(truncated),
}
VALUES = {"with values flipped", "not finite"}
