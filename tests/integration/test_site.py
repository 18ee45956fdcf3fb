"""The documentation site: every page is in its navigation, links are rewritten, and broken ones are found."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from tests import site


def test_every_page_is_in_the_navigation_once() -> None:
    shown = [name for names in site.navigation().values() for name in names]
    assert Counter(shown) == Counter(site.pages().keys())


def test_links_lead_to_pages_or_to_the_repository() -> None:
    api = site.staged("api.md", "https://example.com/tool")
    assert "[command line](index.md#commands)" in " ".join(api.split())
    assert "(https://example.com/tool/blob/main/examples/organism.ipynb)" in api
    assert "[settings.md]" not in api
    assert "(settings.md)" in api
    card = site.staged("index.md", None)
    assert "(screenshots/front.png)" in card
    assert "job/config/default.toml" not in card  # there is no such page, and no repository is named
    note = site.staged("lab-notes/gradient.md", None)
    assert "(../decisions/0031-edits-by-gradient.md)" in note


def test_links_of_a_built_site_that_lead_nowhere_are_found(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text(
        '<h1 id="top"></h1><a href="b.html#there">1</a><a href="https://example.com">2</a>'
    )
    (tmp_path / "b.html").write_text(
        '<a id="there"></a><a href="a.html#gone">1</a><img src="no.png"><a href="#top">2</a>'
    )
    assert site.broken_links(tmp_path) == ["b.html: #top", "b.html: a.html#gone", "b.html: no.png"]


def test_the_site_builds_strictly_without_a_broken_link(tmp_path: Path) -> None:
    site.build(tmp_path / "site", "https://example.com/tool")
    assert site.broken_links(tmp_path / "site") == []
    assert (tmp_path / "site/index.html").is_file()
