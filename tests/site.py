"""`python -m tests.site FOLDER` (`make site`): build the documentation site strictly and check its links.

Pages are those of docs/ and a few of the repository's root. With SITE_REPOSITORY, links to other files lead to that
repository, for example https://github.com/OWNER/abliteration-job; without it they become plain text.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
# Pages outside docs/, and their names on the site.
OTHERS = {"README.md": "index.md", "infra/README.md": "machines.md", "CONTRIBUTING.md": "contributing.md"}
OTHERS |= {"CHANGELOG.md": "changelog.md", "SECURITY.md": "security.md"}
# By task; decisions and lab notes follow.
NAVIGATION = {
    "Start": ("index.md", "concepts.md"),
    "Run a job": ("first-real-model.md", "how-to.md", "scorers.md", "quantised.md", "settings.md", "api.md"),
    "Choose a model and a machine": (
        "models.md",
        "architectures.md",
        "costs.md",
        "hours-and-dollars.md",
        "machines.md",
        "without-an-image.md",
        "gpu.md",
    ),
    "Watch and repair": ("watching.md", "troubleshooting.md", "ends-of-rentals.md", "reliability.md"),
    "Results": ("results.md", "tested.md", "real-model.md", "cards/llama.md"),
    "Project": ("changelog.md", "contributing.md", "security.md", "code-map.md"),
}
# Instead of their first heading.
TITLES = {"index.md": "Overview", "cards/llama.md": "Example of a model card", "lab-notes/README.md": "All topics"}
_LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!https?://|#)([^)#\s]*)(#[^)\s]*)?\)")
_FENCE = re.compile(r"(```.*?```)", re.DOTALL)


def pages() -> dict[str, Path]:
    """Return the site's pages by their names on it."""
    own = {page.relative_to(DOCS).as_posix(): page for page in sorted(DOCS.rglob("*.md"))}
    return own | {name: ROOT / page for page, name in OTHERS.items()}


def navigation() -> dict[str, list[str]]:
    """Return the names of the pages of each section."""
    folders = {"Decisions": "decisions", "Lab notes": "lab-notes"}
    below = {title: sorted(name for name in pages() if name.startswith(f"{at}/")) for title, at in folders.items()}
    return {title: list(names) for title, names in NAVIGATION.items()} | below


def staged(name: str, repository: str | None) -> str:
    """Return a page with the links that it has on the site."""
    places = {page: other for other, page in pages().items()}
    page = pages()[name]

    def link(match: re.Match[str]) -> str:
        picture, text, path, anchor = match[1], match[2], match[3], match[4] or ""
        target = (page.parent / path).resolve()
        if target in places:
            path = os.path.relpath(places[target], Path(name).parent)
        elif DOCS in target.parents and target.is_file():
            path = os.path.relpath(target.relative_to(DOCS), Path(name).parent)
        elif repository is None:
            return text
        else:
            path = f"{repository}/{'tree' if target.is_dir() else 'blob'}/main/{target.relative_to(ROOT).as_posix()}"
        return f"{picture}[{text}]({path}{anchor})"

    parts = _FENCE.split(page.read_text())
    return "".join(part if part.startswith("```") else _LINK.sub(link, part) for part in parts)


def title(name: str) -> str:
    """Return a page's title for the navigation: its first heading."""
    heading = re.search(r"^# (.*)$", pages()[name].read_text(), re.MULTILINE)
    return TITLES.get(name) or re.sub(r"^\d+\. |`", "", heading[1] if heading else name)


def configuration() -> str:
    """Return the site's zensical.toml."""
    sections = [
        f"  {{ {json.dumps(section)} = [\n"
        + "".join(f"    {{ {json.dumps(title(name), ensure_ascii=False)} = {json.dumps(name)} }},\n" for name in names)
        + "  ] },\n"
        for section, names in navigation().items()
    ]
    return f"""[project]
site_name = "abliteration-job"
site_description = "Directional ablation of language models as an unattended batch job"
use_directory_urls = false
nav = [
{"".join(sections)}]

[project.theme]
font = false
features = ["navigation.tabs", "navigation.top", "content.code.copy"]
[[project.theme.palette]]
media = "(prefers-color-scheme: light)"
scheme = "default"
[[project.theme.palette]]
media = "(prefers-color-scheme: dark)"
scheme = "slate"
"""


class _References(HTMLParser):
    """The links and anchors of a page."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.links: set[str] = set()
        self.anchors: set[str] = set()
        self.feed(page.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.anchors |= {value for value in (found.get("id"), found.get("name")) if value}
        self.links |= {value for value in (found.get("href"), found.get("src")) if value}


def broken_links(site: Path) -> list[str]:
    """Return the links within a built site that lead nowhere, each behind its page."""
    seen = {page.resolve(): _References(page) for page in site.rglob("*.html") if page.name != "404.html"}
    broken = []
    for page, references in seen.items():
        for link in sorted(references.links):
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (page.parent / unquote(parts.path)).resolve() if parts.path else page
            target = target / "index.html" if target.is_dir() else target
            known = seen[target].anchors if target in seen else set()
            missing = target in seen and parts.fragment and unquote(parts.fragment) not in known
            if not target.is_file() or missing:
                broken.append(f"{page.relative_to(site.resolve())}: {link}")
    return broken


def build(site: Path, repository: str | None) -> None:
    """Stage the pages beside the site and build it. Raises CalledProcessError for what strict mode refuses."""
    stage = site.parent / f"{site.name}-pages"
    shutil.rmtree(stage, ignore_errors=True)
    shutil.rmtree(site, ignore_errors=True)
    shutil.copytree(DOCS, stage / "docs")
    for name in pages():
        (stage / "docs" / name).write_text(staged(name, repository))
    (stage / "zensical.toml").write_text(configuration())
    words = [sys.executable, "-m", "zensical", "build", "--strict", "--clean"]
    subprocess.run(words, cwd=stage, check=True, env={**os.environ, "NO_COLOR": "1"})
    shutil.move(stage / "site", site)


def main(site: Path) -> None:
    build(site, os.environ.get("SITE_REPOSITORY") or None)
    if broken := broken_links(site):
        sys.exit("these links lead nowhere:\n" + "\n".join(broken))
    print(f"open this in a browser: {site / 'index.html'}")


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute())
