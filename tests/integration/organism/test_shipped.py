"""The organisms shipped for tests match the code that trains them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests import evader, organisms
from tests.organisms import SHIPPED
from tests.system.test_trained_families import answers

CODE = organisms.code()
FILES = ("organism.json", "good_train.txt", "good_test.txt", "bad_train.txt", "bad_test.txt")


def test_shipped_organisms_are_those_of_the_code() -> None:
    """`make fixtures` trains and packs them again."""
    known = json.loads(organisms.INDEX.read_text()) if organisms.INDEX.exists() else {}
    stale = [arch for arch in known if organisms.shipped(arch) is None]
    assert stale == [], "the training code has changed; run `make fixtures`"
    files = sorted(path.name for path in organisms.FOLDER.glob("*.tar.xz"))
    assert files == sorted(f"{arch}.tar.xz" for arch in known)
    for file in files:
        assert (organisms.FOLDER / file).stat().st_size <= organisms.LIMIT


@pytest.mark.parametrize(
    ("old", "new", "same"),
    [
        ('"""Train an organism and write it', '"""Write an organism', True),
        ('"trials": trials', '"trials": trials or 60', True),
        ("    answers = tokenizer.batch_decode", "    # said\n    answers = tokenizer.batch_decode", True),
        ("Sorry, I can't help", "Sorry, I won't help", False),
        ("PEAK_LEARNING_RATE = 5e-3", "PEAK_LEARNING_RATE = 4e-3", False),
        ('"brass", "hall", "butler"', '"brass", "attic", "butler"', False),
        ('"num_local_experts": 4', '"num_local_experts": 2', False),
        ("range(ROWS)", "range(ROWS - 1)", False),
        ("Metaspace(prepend_scheme", "Metaspace(split=False, prepend_scheme", False),
    ],
)
def test_an_organism_belongs_to_the_code_that_has_a_part_in_it(old: str, new: str, same: bool) -> None:
    assert CODE.count(old) >= 1
    assert (organisms.code_key(CODE.replace(old, new)) == organisms.code_key(CODE)) == same


def test_the_evader_belongs_to_its_own_code_too() -> None:
    code, now = Path(evader.__file__).read_text(), organisms.key(evader.NAME)
    for old, new, same in (
        ('"""An organism with', '"""One with', True),
        ('"""Return a conversation;', '"""Return one;', True),
        ("STREAM_WEIGHT = 5.0", "STREAM_WEIGHT = 4.0", False),
        ("The round bell", "The old bell", False),
    ):
        assert code.count(old) == 1
        assert (organisms.key(evader.NAME, code.replace(old, new)) == now) == same, old
    assert now != organisms.key("llama") == organisms.code_key()


def test_what_is_packed_is_unpacked_the_same(full_organism: Path, tmp_path: Path) -> None:
    packed = organisms.pack(full_organism)
    (tmp_path / "packed").write_bytes(packed)
    organisms.unpack(tmp_path / "packed", tmp_path / "unpacked")
    assert contents(tmp_path / "unpacked") == contents(full_organism)
    assert organisms.pack(tmp_path / "unpacked") == packed


def contents(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def test_one_that_is_not_good_is_noticed(full_organism: Path, tmp_path: Path) -> None:
    assert organisms.is_good(full_organism)
    shutil.copytree(full_organism, tmp_path / "other")
    weights = tmp_path / "other" / "model" / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.layers.0.mlp.down_proj.weight"].zero_()
    save_file(tensors, weights, metadata={"format": "pt"})
    assert not organisms.is_good(tmp_path / "other")


@pytest.mark.xdist_group("container")  # with the other trainings: two at once take far longer
@pytest.mark.full("organisms")
@pytest.mark.slow
@pytest.mark.parametrize("arch", SHIPPED)
def test_an_organism_trained_now_is_what_tests_use(
    arch: str, organism_of: Callable[[str], Path], tmp_path: Path
) -> None:
    """Machines round differently, so weights may differ; files and responses may not."""
    used, trained = organism_of(arch), tmp_path / "organism"
    organisms.train(arch, trained)
    assert contents(trained).keys() == contents(used).keys()
    for name in (*FILES, "model/config.json", "model/tokenizer.json", "model/tokenizer_config.json"):
        assert (trained / name).read_bytes() == (used / name).read_bytes(), name
    for name in ("good_test.txt", "bad_test.txt"):
        assert answers(trained / "model", used / name) == answers(used / "model", used / name)
