"""Documents and output read as plain English: no phrase that reads like a translation, no overlong sentence."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    page
    for name in ("README.md", "CONTRIBUTING.md", "docs/*.md", "docs/decisions/*.md", "docs/lab-notes/*.md")
    for page in ROOT.glob(name)
)
JOB = ROOT / "job"
CODE = sorted(JOB.rglob("*.py"))
# Of the report's pages and the model card.
TEMPLATES = sorted([*JOB.rglob("*.html"), *JOB.rglob("*.md")])
WORDS = 30
PHRASES = (
    "so many", "as many", "of which", "of whom", "likewise", "is told", "are told", "nobody", "whoever", "what all",
    "what is to", "one after another", "one after the other", "let go", "as good as",
    "what others are compared with", "what is known of", "what is left to", "what a trial", "worth an answer",
    "all who are there", "such a one", "refuses no more", "usual ones", "made one long", "goes to asking",
    "it waits for", "by no other", "from which this", "up to a tie", "is asked whether", "was asked whether",
    "what can be known", "once upon a time", "what becomes of", "cannot be told", "come into question", "stays down",
    "go together with", "goes together with", "the right to write",
)  # fmt: skip
_PHRASE = re.compile(r"\b(?:" + "|".join(PHRASES) + r")\b", re.IGNORECASE)
_BLOCKS = re.compile(r"```.*?```|<!--.*?-->", re.DOTALL)
_LINK = re.compile(r"!?\[([^]]*)\]\([^)]*\)")
_CODE = re.compile(r"`[^`]*`")
_ITEM = re.compile(r"(?:[-*]|\d+\.) ")
_TABLE, _HEADING, _INDENTED = re.compile(r" *\|"), re.compile("#"), re.compile(" {4}")
# A full stop after these ends no sentence.
_ABBREVIATION = re.compile(r"\b(e\.g|i\.e|etc|vs)\. ")


def prose(page: str) -> str:
    """Return a page without code and URLs; code in running text counts as one word."""
    return _CODE.sub("CODE", _LINK.sub(r"\1", _BLOCKS.sub("\n\n", page)))


def sentences(page: str) -> Iterator[str]:
    """Yield the sentences of paragraphs and list items, without tables and headings."""
    paragraph: list[str] = []
    for line in [*prose(page).splitlines(), ""]:
        starts = _ITEM.match(line.lstrip()) is not None
        skipped = any(kind.match(line) for kind in (_TABLE, _HEADING)) or (_INDENTED.match(line) and not paragraph)
        if not line.strip() or starts or skipped:
            text = _ABBREVIATION.sub(r"\1 ", " ".join(" ".join(paragraph).split()))
            yield from filter(None, re.split(r"(?<=[.!?])[*_)\"]* +", text))
            paragraph = []
        if line.strip() and not skipped:
            paragraph.append(_ITEM.sub("", line.lstrip(), count=1) if starts else line)


def literals(code: str) -> Iterator[str]:
    """Yield the string literals of a module, without docstrings."""
    tree = ast.parse(code)
    docstrings = {node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in docstrings:
            yield " ".join(node.value.split())


@pytest.mark.parametrize("file", CODE, ids=lambda file: file.relative_to(JOB).as_posix())
def test_no_output_reads_like_a_translation(file: Path) -> None:
    assert [text for text in literals(file.read_text()) if _PHRASE.search(text)] == []


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda template: template.name)
def test_no_template_reads_like_a_translation(template: Path) -> None:
    assert _PHRASE.findall(" ".join(template.read_text().split())) == []


def test_literals_are_seen() -> None:
    code = 'def f():\n    """Not this."""\n    say(f"one {1} two", remedy="three " "four")\n'
    assert list(literals(code)) == ["one", "two", "three four"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_page_reads_like_a_translation(page: Path) -> None:
    assert _PHRASE.findall(" ".join(prose(page.read_text()).split())) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_sentence_is_too_long(page: Path) -> None:
    long = {sentence: len(sentence.split()) for sentence in sentences(page.read_text())}
    assert {sentence: words for sentence, words in long.items() if words > WORDS} == {}


def test_sentences_are_told_apart() -> None:
    page = "# A heading\n\nOne `a. b` is. Two [a link](x.md)\ngoes, e.g. so!\n\n- three\n  more\n- four\n\n| a. b |\n"
    assert list(sentences(page)) == ["One CODE is.", "Two a link goes, e.g so!", "three more", "four"]
