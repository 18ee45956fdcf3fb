"""Text on a picture."""

from __future__ import annotations

import io

import pytest
from PIL import Image

from job.export.canvas import Canvas, fitted, text_width


def drawn(text: str, *, width: int | None = None, anchor: str = "left", x: int = 10) -> Image.Image:
    """Return a picture with a line of text."""
    canvas = Canvas(400, 60, "#ffffff")
    canvas.text((x, 10), text, 24, "#000000", width=width, anchor=anchor)  # type: ignore[arg-type]
    return Image.open(io.BytesIO(canvas.png())).convert("L").point(lambda value: 255 - value)


@pytest.mark.parametrize("length", range(20, 90, 5))
def test_text_gets_smaller_until_all_of_it_fits(length: int) -> None:
    text = ("a line of some length, " * 5)[:length]
    found, size = fitted(text, 26, 400)
    assert found == text
    assert 10 <= size <= 26
    assert text_width(text, size) <= 400
    assert size == 26 or text_width(text, size + 1) > 400


def test_text_that_does_not_fit_in_the_smallest_size_loses_its_end() -> None:
    cut, size = fitted("x" * 1000, 48, 300)
    assert (cut.endswith("x..."), size) == (True, 10)
    assert 280 < text_width(cut, size) <= 300
    assert fitted("xxxx", 10, 0) == ("...", 10)
    left, _, right, _ = drawn("x" * 1000, width=300).getbbox() or (0, 0, 0, 0)
    assert 280 < right - left <= 300


def test_letters_that_the_font_lacks_lose_their_accent_or_become_question_marks() -> None:
    assert drawn("Café 模 “x”").tobytes() == drawn("Cafe ? “x”").tobytes()


def test_anchors_place_text() -> None:
    def columns(anchor: str) -> tuple[int, int]:
        left, _, right, _ = drawn("word", anchor=anchor, x=200).getbbox() or (0, 0, 0, 0)
        return left, right

    assert columns("left")[0] >= 200 > columns("middle")[0]
    assert columns("right")[1] <= 201 < columns("middle")[1]
