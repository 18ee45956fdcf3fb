"""Headers of cards: what would expand without bound is refused before a library reads it."""

from __future__ import annotations

from pathlib import Path

import pytest

from job.data.folders import folder_files
from job.errors import ImpossibleJobError
from job.model.base_card import read_base_card
from job.text.card_header import require_plain_header

# Ten to the power of ten entries, in two kinds of YAML.
LISTS = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 10)}]\n" for level in range(1, 10)
)
TABLES = "a0: &a0 {x: 1}\n" + "".join(
    f"a{level}: &a{level}\n  <<: [{', '.join([f'*a{level - 1}'] * 10)}]\n" for level in range(1, 10)
)
FIELDS = "license: *a9\nlanguage: *a9\ntags: *a9\nconfigs:\n- config_name: default\n  data_files: *a9\n"


DASHES = LISTS.replace("&a", "&-a").replace("*a", "*-a")
LATER = "---x: 1\n" + LISTS


@pytest.mark.parametrize("bomb", [LISTS, TABLES, DASHES, LATER], ids=["lists", "tables", "dashes", "later"])
def test_a_card_that_grows_without_bound_is_not_expanded(tmp_path: Path, bomb: str) -> None:
    """Regression: such a card of a base model took all memory while the export was written, after the whole search."""
    (tmp_path / "README.md").write_text(
        f"---\n{bomb}{FIELDS if bomb != DASHES else FIELDS.replace('*a', '*-a')}---\n# A model\n"
    )
    (tmp_path / "train.txt").write_text("Stir the soup.\n")
    with pytest.raises(ValueError, match="repeats parts of itself"):
        require_plain_header(tmp_path / "README.md")
    assert read_base_card(tmp_path).left_out == ("all fields, which cannot be read",)
    with pytest.raises(ImpossibleJobError, match="repeats parts of itself"):
        folder_files(tmp_path, "train", None)


def test_a_list_within_a_value_is_named_by_its_type(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\nlanguage: [en, [x, y], {a: 1}, no, Klingon]\n---\n")
    found = read_base_card(tmp_path)
    assert found.metadata == {"language": ["en"]}
    assert found.left_out == ("language: list", "language: dict", "language: False", "language: Klingon")


def test_other_cards_are_read(tmp_path: Path) -> None:
    text = (
        "---\nlicense: mit\nnotes: |\n  R&D *is* **fun**\ntags: &t [a, b]\nmore: *t\n---\n"
        + "*word* &nbsp; &more\n" * 50
    )
    (tmp_path / "README.md").write_text(text)
    require_plain_header(tmp_path / "README.md")
    assert read_base_card(tmp_path).metadata == {"license": "mit"}
    (tmp_path / "README.md").write_text(text + "*word* and *word*\n" * 50 + " " * (1 << 22))
    with pytest.raises(ValueError, match="4 MiB"):
        require_plain_header(tmp_path / "README.md")
