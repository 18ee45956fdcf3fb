"""Decode text files: UTF-8 with or without a byte order mark, UTF-16 and UTF-32."""

from __future__ import annotations

import codecs

# What git puts in place of a file that Git LFS has not fetched.
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
# UTF-32's little-endian mark begins with UTF-16's.
_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
# Share of zeros in every other byte above which text without a mark is taken for UTF-16.
_ZEROS = 0.4


def encoding_of(start: bytes) -> str:
    """Detect a text's encoding from its first bytes: by its mark, UTF-16 by its zeros, else UTF-8."""
    for mark, encoding in _MARKS:
        if start.startswith(mark):
            return encoding
    for odd, encoding in ((1, "utf-16-le"), (0, "utf-16-be")):
        places = start[odd::2]
        if places and places.count(0) > _ZEROS * len(places) and 0 not in start[1 - odd :: 2]:
            return encoding
    return "utf-8"


def decoded(data: bytes) -> str:
    """Decode a whole file, without its byte order mark. Raises UnicodeDecodeError."""
    return data.decode(encoding_of(data))
