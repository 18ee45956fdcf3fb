"""The picture of a result to share."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from job.report import picture
from tests.helpers import abliterate, only_job


def test_a_result_is_drawn(finished: Path, tmp_path: Path) -> None:
    file = tmp_path / "result.png"
    found = abliterate("report", "--workspace", finished, "--picture", file, "--json").check()
    assert str(file) in found.out
    with Image.open(file) as drawn:
        assert (drawn.format, drawn.size) == ("PNG", (1200, 630))
        colours = {colour for _, colour in drawn.convert("RGB").getcolors(2**20)}
    shown = {tuple(int(text[place : place + 2], 16) for place in (1, 3, 5)) for text in picture._COLOURS.values()}
    assert shown <= colours  # all trials, the front, the base model and the chosen trial


def test_the_picture_names_no_path(finished: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from job.storage.run_folder import RunFolder

    said: list[str] = []
    monkeypatch.setattr(picture, "_text", lambda draw, place, text, *rest, **more: said.append(text))
    picture.write_picture(RunFolder(only_job(finished)), tmp_path / "result.png")
    assert "model" in said
    assert all(ord(letter) < 0x250 for text in said for letter in text)  # Pillow's font has no arrows
    assert not any("/" in text for text in said if not text.endswith("nats"))


def test_what_cannot_be_drawn_or_written_is_said(finished: Path, tmp_path: Path) -> None:
    abliterate("report", "--workspace", finished, "--picture", tmp_path / "no/result.png").fails(76, "cannot write")
