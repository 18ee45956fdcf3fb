"""The YAML header of a model's or a dataset's card, checked before a library expands it."""

from __future__ import annotations

import re
from pathlib import Path

_MOST_BYTES = 1 << 22
# A header that repeats itself may grow to ten to the power of its depth. No card needs more repetitions than these.
_MOST_REPEATED = 20
_HEADER = re.compile(r"\s*---(?:\r\n|\r|\n)([\S\s]*?)(?:\r\n|\r|\n)---[ \t]*(?:\r|\n|$)")
_REPEATED = re.compile(r"(?<![^\s\[{,:-])\*[A-Za-z0-9_-]")
_NAMED = re.compile(r"(?<![^\s\[{,:-])&[A-Za-z0-9_-]")


def require_plain_header(card: Path) -> None:
    """Raise ValueError for a card that would expand without bound, or OSError."""
    if card.stat().st_size > _MOST_BYTES:
        raise ValueError(f"it has more than {_MOST_BYTES >> 20} MiB")
    header = _HEADER.match(card.read_bytes().decode("utf-8-sig", "replace"))
    if header and _NAMED.search(header[1]) and len(_REPEATED.findall(header[1])) > _MOST_REPEATED:
        raise ValueError(f"its header repeats parts of itself more than {_MOST_REPEATED} times")
