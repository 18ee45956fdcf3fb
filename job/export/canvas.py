"""Text, lines, boxes and dots, drawn with Pillow and its own font."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from io import BytesIO
from typing import Literal, TypeAlias
from unicodedata import combining, normalize

from PIL import Image, ImageDraw, ImageFont

Point: TypeAlias = tuple[int, int]
Box: TypeAlias = tuple[int, int, int, int]
Anchor: TypeAlias = Literal["left", "middle", "right"]

_ANCHORS = {"left": "la", "middle": "ma", "right": "ra"}
_SMALLEST = 10
# The font has these beyond Latin-1's plain letters.
_PUNCTUATION = "–’“”"


class Canvas:
    """A picture of `width` × `height` pixels; colours are written like #1b1f24."""

    def __init__(self, width: int, height: int, paper: str) -> None:
        self._image = Image.new("RGB", (width, height), paper)
        self._draw = ImageDraw.Draw(self._image)

    def png(self) -> bytes:
        """Return the picture as a PNG file; the same versions of Pillow and zlib write the same bytes."""
        file = BytesIO()
        self._image.save(file, "PNG", optimize=True)
        return file.getvalue()

    def box(self, box: Box, colour: str) -> None:
        """Fill a box: left, top, right and bottom, the last two not included."""
        left, top, right, bottom = box
        if left < right and top < bottom:
            self._draw.rectangle((left, top, right - 1, bottom - 1), fill=colour)

    def frame(self, box: Box, colour: str) -> None:
        """Draw the edges of a box."""
        self._draw.rectangle(box, outline=colour)

    def dot(self, place: Point, radius: int, colour: str) -> None:
        """Draw a filled circle."""
        x, y = place
        self._draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)

    def line(self, places: Sequence[Point], width: int, colour: str) -> None:
        """Draw a line through points."""
        if len(places) > 1:
            self._draw.line(list(places), fill=colour, width=width)

    def text(
        self, place: Point, text: str, size: int, colour: str, *, width: int | None = None, anchor: Anchor = "left"
    ) -> None:
        """Write a line of text with its top at `place`.

        Text wider than `width` gets smaller, at most to the smallest readable size; then its end is left out.
        """
        text = _drawable(text)
        if width is not None:
            text, size = fitted(text, size, width)
        self._draw.text(place, text, fill=colour, font=_font(size), anchor=_ANCHORS[anchor])


def text_width(text: str, size: int) -> int:
    """Return the width of a line of text in pixels."""
    length: float = _font(size).getlength(_drawable(text))
    return round(length)


def fitted(text: str, size: int, width: int) -> tuple[str, int]:
    """Return a text and a size in which it is no wider than `width`, shortened if it must be."""
    while size > _SMALLEST and text_width(text, size) > width:
        size -= 1
    if text_width(text, size) <= width:
        return text, size
    while text and text_width(f"{text}...", size) > width:
        text = text[:-1]
    return f"{text}...", size


@cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _drawable(text: str) -> str:
    """Return text without accents, which the font lacks; letters of other scripts become question marks."""
    plain = (one for one in normalize("NFKD", text) if not combining(one))
    return "".join(one if ord(one) < 0x100 or one in _PUNCTUATION else "?" for one in plain)
