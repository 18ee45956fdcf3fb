"""report.html: one self-contained page; its content policy forbids network access."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import plotly.offline

from job.report.run_view import RunView
from job.report.sections import cards, headline, notes, sections
from job.text.markup import escaped, paragraph

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data: blob:"


def report_page(story: RunView, *, private: bool = False) -> str:
    """Return the page; `private` includes responses to bad prompts."""
    made = sections(story, private=private)
    links = "".join(f'<li><a href="#{name}">{escaped(title)}</a></li>' for name, title, _ in made)
    content = "\n".join(
        f'<section aria-labelledby="{name}"><h2 id="{name}">{escaped(title)}</h2>{html}</section>'
        for name, title, html in made
    )
    title = f"Report of job {story.record.job_id}"
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escaped(title)}</title>
<style>{_resource("page.css")}</style>
<script>{plotly.offline.get_plotlyjs()}</script>
</head>
<body>
<a class="skip" href="#content">To the content</a>
<header>
<h1>{escaped(title)}</h1>
{paragraph(f"Model: {'/'.join(Path(story.record.settings['model']).parts[-2:])}", "faint")}
</header>
<nav aria-label="Contents"><ul>{links}</ul></nav>
<main id="content">
{paragraph(headline(story), "headline")}
{"".join(paragraph(note, "note") for note in notes(story))}
{cards(story)}
{content}
</main>
<footer class="faint">Made with abliteration-job {escaped(story.record.versions.get("abliteration-job", ""))}.</footer>
<script>{_resource("page.js")}</script>
</body>
</html>
"""


def _resource(name: str) -> str:
    return resources.files("job.report").joinpath(name).read_text("utf-8")
