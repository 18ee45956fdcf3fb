"""Commands in the documentation parse, and its links resolve."""

from __future__ import annotations

import ast
import itertools
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main

from job.cli.app import app
from tests import code_map

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    page for folder in (".", "docs", "docs/decisions", "docs/lab-notes") for page in ROOT.glob(f"{folder}/*.md")
)
# Commands of former versions.
HISTORY = {ROOT / "CHANGELOG.md", *ROOT.glob("docs/lab-notes/*.md")}
_BLOCK = re.compile(r"```(?:sh|console)\n(.*?)```", re.DOTALL)
_INLINE = re.compile(r"`(abliterate [^`]+)`")
_LINK = re.compile(r"\]\((?!https?://)([^)#\s]*)#?([^)\s]*)\)")
_TEST = re.compile(r"((?:\w+/)*test_\w+\.py)(?:::(test_\w+))?")
_HEADING = re.compile(r"^#+ (.*)$", re.MULTILINE)


def commands(page: Path) -> Iterator[str]:
    """Yield all our commands in a page: whole lines of blocks, and complete ones in running text."""
    text = page.read_text()
    for block in _BLOCK.findall(text):
        for line in block.replace("\\\n", " ").splitlines():
            line = line.removeprefix("$ ").strip()
            if line.startswith("abliterate "):
                yield line
    for line in _INLINE.findall(text):
        if "..." not in line and "…" not in line and "|" not in line:
            yield " ".join(line.split())


def parsed(line: str) -> str:
    """Return the name of a line's command; its arguments are parsed but not run."""
    words = shlex.split(line, comments=True)[1:]
    words = list(itertools.takewhile(lambda word: word not in (">", "|", "&&", "&"), words))
    # A placeholder, such as N, may stand for a number.
    words = ["1" if word.isalpha() and word.isupper() else word for word in words]
    found: Any = typer.main.get_command(app)
    context = found.make_context("abliterate", [words[0], "--help"], resilient_parsing=True)
    while hasattr(found, "commands"):
        name, found, words = words[0], found.commands[words[0]], words[1:]
        if not words and hasattr(found, "commands"):
            return name
        context = found.make_context(name, words, parent=context, resilient_parsing=not words)
        if hasattr(found, "commands"):
            context.args = []
    return str(context.info_name)


@pytest.mark.parametrize("page", [page for page in PAGES if page not in HISTORY], ids=lambda page: page.name)
def test_commands_in_the_docs_are_understood(page: Path) -> None:
    for line in commands(page):
        parsed(line)


def test_the_map_of_the_code_is_up_to_date() -> None:
    """`python -m tests.code_map --write docs/code-map.md` makes it so."""
    assert (ROOT / "docs/code-map.md").read_text() == code_map.page()


@pytest.mark.parametrize(("question", "file", "name"), code_map.WHERE)
def test_the_map_of_the_code_names_what_there_is(question: str, file: str, name: str) -> None:
    defined = [node.name for node in ast.walk(ast.parse((ROOT / file).read_text())) if hasattr(node, "name")]
    assert name in defined, question


def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub gives to a page's headings."""
    headings = (heading.lower() for heading in _HEADING.findall(page.read_text()))
    return {re.sub(r"[^\w -]", "", heading).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for link, anchor in _LINK.findall(page.read_text()):
        target = page.parent / link if link else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), f"{link}#{anchor}"


def test_no_page_names_the_host_of_a_package_registry() -> None:
    """The clients of registries know where to go, and mirrors have other addresses."""
    hosts = re.compile(r"\b(pypi|pythonhosted|npmjs|anaconda)\.(org|com)\b")
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "infra").rglob("*.md")]
    assert len(pages) > 50
    assert [page.name for page in pages if hosts.search(page.read_text())] == []


@pytest.mark.parametrize("page", [page for page in PAGES if page not in HISTORY], ids=lambda page: page.stem)
def test_tests_that_a_page_names_exist(page: Path) -> None:
    for path, name in _TEST.findall(page.read_text()):
        files = [file for file in (ROOT / "tests").rglob(Path(path).name) if file.as_posix().endswith(f"/{path}")]
        assert files, path
        assert not name or any(f"def {name}(" in file.read_text() for file in files), name


@pytest.mark.parametrize("page", sorted(ROOT.glob("docs/lab-notes/[a-z]*.md")), ids=lambda page: page.name)
def test_the_newest_note_stands_first(page: Path) -> None:
    dates = re.findall(r"^## (\S+) · ", page.read_text(), re.MULTILINE)
    assert len(dates) == page.read_text().count("\n## ")
    assert dates == sorted(dates, reverse=True)
