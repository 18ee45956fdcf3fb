"""The pictures of a result: one to share, one on the model card."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from job.export.canvas import Canvas
from job.export.model_card import title
from job.export.picture import card_picture
from job.export.reproduction import read_reproduction
from job.report import picture
from job.storage.atomic import sha256_file
from job.storage.run_folder import RunFolder
from tests.helpers import abliterate, only_job


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Collect the texts that are drawn."""
    texts: list[str] = []
    draw = Canvas.text

    def listen(canvas: Canvas, place: tuple[int, int], text: str, *rest: object, **more: object) -> None:
        texts.append(text)
        draw(canvas, place, text, *rest, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(Canvas, "text", listen)
    return texts


def test_a_result_is_drawn(finished: Path, tmp_path: Path) -> None:
    file = tmp_path / "result.png"
    found = abliterate("report", "--workspace", finished, "--picture", file, "--json").check()
    assert str(file) in found.out
    with Image.open(file) as drawn:
        assert (drawn.format, drawn.size) == ("PNG", (1200, 630))
        colours = {colour for _, colour in drawn.convert("RGB").getcolors(2**20)}
    shown = {tuple(int(text[place : place + 2], 16) for place in (1, 3, 5)) for text in picture._COLOURS.values()}
    assert shown <= colours  # all trials, the front, the base model and the chosen trial
    again = tmp_path / "again.png"
    picture.write_picture(RunFolder(only_job(finished)), again)
    assert again.read_bytes() == file.read_bytes()


def test_the_picture_names_no_path(finished: Path, said: list[str], tmp_path: Path) -> None:
    picture.write_picture(RunFolder(only_job(finished)), tmp_path / "result.png")
    assert "model" in said
    assert not any("/" in text for text in said if not text.endswith("nats"))


def test_an_export_holds_its_cards_picture(finished: Path, said: list[str]) -> None:
    export = only_job(finished) / "export"
    made = read_reproduction(export / "reproduce.json")
    assert (export / "result.png").read_bytes() == card_picture(made, title(made))
    prompts = {line for kind in ("good", "bad") for line in _prompts(finished, kind)}
    assert prompts
    assert not any(prompt in text for prompt in prompts for text in said)
    assert not any("/" in text for text in said)
    manifest = json.loads((export / "manifest.json").read_text())["files"]
    assert manifest["result.png"]["sha256"] == sha256_file(export / "result.png")
    assert "  result.png\n" in (export / "SHA256SUMS").read_text()
    assert "](result.png)" in (export / "README.md").read_text()


def test_what_cannot_be_written_is_said(finished: Path, tmp_path: Path) -> None:
    abliterate("report", "--workspace", finished, "--picture", tmp_path / "no/result.png").fails(76, "cannot write")


def _prompts(workspace: Path, kind: str) -> list[str]:
    """Return the prompts whose responses the run folder keeps."""
    kept = json.loads((only_job(workspace) / "answers" / "base.json").read_text())
    return [one["prompt"] for one in kept[kind]]
