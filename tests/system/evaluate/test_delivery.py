"""A quantised file is measured itself, and delivered with its figures only if it misses no bound."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard

from job.realmodel.conversion import convert
from job.storage.atomic import sha256_file
from tests.helpers import abliterate
from tests.tiny_gguf import tiny, write_gguf

CARD = "README.md"


@pytest.fixture
def options(tmp_path: Path) -> list[str]:
    """Return the words of a comparison of `edited.gguf` with the folder `base`, other weights of the same model."""
    write_gguf(tmp_path / "base.gguf", tiny())
    convert(tmp_path / "base.gguf", tmp_path / "base")
    (tmp_path / "base" / "LICENSE").write_text("terms")
    edited = tiny()
    for name, parameter in edited.named_parameters():
        if "down_proj" in name:
            parameter.data.add_(torch.full_like(parameter, 0.02))
    write_gguf(tmp_path / "edited.gguf", edited)
    for kind in ("good", "bad"):
        (tmp_path / f"{kind}.txt").write_text("help me\nwhere is the red kettle\nname a tree\n")
    prompts = ["--good-prompts", f"{tmp_path}/good.txt", "--bad-prompts", f"{tmp_path}/bad.txt", "--text", "none"]
    return ["--against", f"{tmp_path}/base", *prompts, "--set", "scoring.answer_tokens=8"]


def test_a_file_that_misses_a_bound_is_measured_but_not_delivered(tmp_path: Path, options: list[str]) -> None:
    file, out, target = tmp_path / "edited.gguf", tmp_path / "found.json", tmp_path / "target"
    given = ("evaluate", file, *options, "--out", out, "--upload", f"file://{target}")
    missed = abliterate(*given, "--gate", "--max-kl", "1e-9")
    missed.fails(5, "the KL divergence is", "max_kl is 1e-09")
    assert "not llama.cpp's arithmetic" in missed.out
    found = json.loads(out.read_text())
    assert found["edited"]["kl"] > 1e-9
    assert not target.exists()
    assert not (tmp_path / ".edited.gguf.delivery").exists()
    abliterate(*given, "--max-kl", "1e-9").fails(5, "max_kl")
    abliterate(*given, "--max-refusals", 0, "--set", "max_kl=1e-9").fails(5)
    abliterate(*given, "--set", "max_kl=1e-9").fails(5, "max_kl")


def test_a_file_that_passes_is_delivered_as_it_was_measured(tmp_path: Path, options: list[str]) -> None:
    file, target = tmp_path / "edited.gguf", tmp_path / "target"
    # Some of the base model's responses hold it.
    marker = ("--set", 'scoring.refusal_markers=["pp"]')
    given = ("evaluate", file, *options, *marker, "--max-kl", 50, "--upload", f"file://{target}")
    assert "delivered edited.gguf" in abliterate(*given).check().err
    files = json.loads((target / "manifest.json").read_text())["files"]
    assert set(files) == {"edited.gguf", "measurement.json", CARD, "LICENSE", "SHA256SUMS"}
    assert (target / "edited.gguf").read_bytes() == file.read_bytes()
    found = json.loads((target / "measurement.json").read_text())
    assert (found["model"], found["against"]) == ("edited.gguf", "base")
    assert found["reading"]["sha256"] == {"edited.gguf": sha256_file(target / "edited.gguf")}
    card = ModelCard.load(target / CARD)
    assert card.data.to_dict()["tags"] == ["abliterated", "not-for-all-audiences"]
    assert "not llama.cpp's arithmetic" in card.text
    assert f"{found['edited']['kl']:.4g} nats" in card.text
    assert "markers and soft 1.00 (base model)" in card.text
    assert str(tmp_path) not in (target / CARD).read_text() + (target / "measurement.json").read_text()
    assert not (tmp_path / ".edited.gguf.delivery").exists()
    # Again: the same files, so nothing changes.
    before = {path.name: path.stat().st_mtime_ns for path in target.iterdir()}
    abliterate(*given).check()
    assert {path.name: path.stat().st_mtime_ns for path in target.iterdir()} == before


def test_a_folder_keeps_its_own_card(tmp_path: Path, options: list[str]) -> None:
    folder, target = Path(shutil.copytree(tmp_path / "base", tmp_path / "eight")), tmp_path / "target"
    own = "---\nlicense: mit\n---\n\n# Mine\n\nWords of mine.\n"
    (folder / CARD).write_text(own)
    (folder / "result.png").write_bytes(b"a picture of mine")
    given = ("evaluate", folder, *options, "--upload")
    abliterate(*given, f"file://{target}").check()
    card = (target / CARD).read_text()
    assert card.startswith(own)
    assert card.count("## Measured") == 1
    assert (folder / CARD).read_text() == own
    # A delivery that is measured again has one section of figures, the new one.
    abliterate("evaluate", target, *options, "--upload", f"file://{tmp_path}/second").check()
    assert (tmp_path / "second" / CARD).read_text() == card
    # Other files of the folder may be private; the picture that an export's card shows goes with the card.
    assert not (target / "result.png").exists()
    (folder / CARD).write_text(f"{own}\n![the result](result.png)\n")
    abliterate(*given, f"file://{tmp_path}/third").check()
    assert (tmp_path / "third" / "result.png").read_bytes() == b"a picture of mine"


def test_a_failed_delivery_keeps_what_it_prepared_and_is_continued(tmp_path: Path, options: list[str]) -> None:
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "mine.txt").write_text("kept")
    given = ("evaluate", tmp_path / "edited.gguf", *options, "--upload", f"file://{tmp_path}/target")
    abliterate(*given).fails(6, "holds something else", "run the same command again")
    assert (tmp_path / ".edited.gguf.delivery" / "manifest.json").is_file()
    assert (tmp_path / "target" / "mine.txt").read_text() == "kept"
    shutil.rmtree(tmp_path / "target")
    abliterate(*given).check()
    assert (tmp_path / "target" / "edited.gguf").is_file()


def test_bounds_and_options_that_do_not_go_together_are_refused_at_once(tmp_path: Path) -> None:
    both = ("model.gguf", "--against", "base")
    abliterate("evaluate", *both, "--gate").fails(2, "--gate needs a bound", "--max-kl")
    abliterate("evaluate", *both, "--load-in", "fp8").fails(2, "knows no fp8", "bnb-8bit")
    abliterate("evaluate", "--upload", f"file://{tmp_path}").fails(2, "--upload", "`abliterate upload`")
    abliterate("evaluate", "--load-in", "bnb-8bit").fails(2, "--load-in")
    abliterate("evaluate", "me/model", "--against", "base", "--upload", f"file://{tmp_path}").fails(2, "on the Hub")


@pytest.mark.slow
def test_a_job_has_its_own_bounds(organism: Path, finished: Path, tmp_path: Path) -> None:
    for kind in ("good", "bad"):
        lines = (organism / f"{kind}_test.txt").read_text().splitlines()[:4]
        (tmp_path / f"{kind}.txt").write_text("\n".join(lines))
    workspace = tmp_path / "runs"
    shutil.copytree(finished, workspace, symlinks=True)
    prompts = ["--good-prompts", f"{tmp_path}/good.txt", "--bad-prompts", f"{tmp_path}/bad.txt", "--text", "none"]
    given = ("evaluate", "--workspace", workspace, *prompts)
    abliterate(*given, "--gate").fails(2, "--gate needs a bound")
    abliterate(*given, "--gate", "--max-kl", "1e-12").fails(5, "max_kl is 1e-12")
    abliterate(*given, "--max-kl", 50).check()
