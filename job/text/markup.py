"""HTML and Markdown fragments; all input text is redacted and escaped."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from job.text.redaction import redact


@dataclass(frozen=True)
class Markup:
    """Text that is already HTML."""

    html: str


Cell = str | Markup


def escaped(cell: Cell) -> str:
    """Redact a text and escape it for HTML."""
    return cell.html if isinstance(cell, Markup) else html.escape(redact(cell))


# Markup characters, written as entities, which cannot end a table's cell either.
_MARKS = re.compile(r"[&<>|\\`*\[\]~$]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])|(?<!\S)#|^[=+-]")
_NUMBER = re.compile(r"^(\d+)([.)])(?=\s|$)")


def printable(text: str) -> str:
    """Replace control and invisible characters by spaces; line feeds stay."""
    return "".join(char if char.isprintable() or char == "\n" else " " for char in text)


def one_line(text: object) -> str:
    """Return a text on one line, without control characters."""
    return " ".join(printable(str(text)).split())


def markdown(text: object) -> str:
    """Redact a text and escape it for Markdown, on one line."""
    escaped_marks = _MARKS.sub(lambda found: f"&#{ord(found[0])};", one_line(text))
    return _NUMBER.sub(lambda found: f"{found[1]}&#{ord(found[2])};", escaped_marks)


def table(caption: str, head: Sequence[str], rows: Iterable[Sequence[Cell]]) -> str:
    """Return a table that scrolls on narrow pages; the first cell of every row is its heading."""
    columns = "".join(f'<th scope="col">{escaped(cell)}</th>' if cell else "<td></td>" for cell in head)
    body = "".join(
        f'<tr><th scope="row">{escaped(row[0])}</th>{"".join(f"<td>{escaped(cell)}</td>" for cell in row[1:])}</tr>'
        for row in rows
    )
    return (
        f'<div class="wide" role="region" tabindex="0" aria-label="{escaped(caption)}"><table>'
        f"<caption>{escaped(caption)}</caption><thead><tr>{columns}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def table_of(markdown: str, caption: str) -> str:
    """Convert a Markdown table without markup in its cells to HTML."""
    rows = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in markdown.strip().splitlines()]
    return table(caption, rows[0], rows[2:])


def details(summary: str, content: str) -> str:
    """Return collapsible content."""
    return f"<details><summary>{escaped(summary)}</summary>{content}</details>"


def figure(caption: str, chart: str, label: str | None = None) -> str:
    """Return a chart with a caption and a label for screen readers; its values must also be in a table."""
    return (
        f"<figure><figcaption>{escaped(caption)}</figcaption>"
        f'<div class="chart" role="img" aria-label="{escaped(label or caption)}">{chart}</div></figure>'
    )


def definitions(items: Mapping[str, str]) -> str:
    """Return a definition list."""
    pairs = "".join(f"<dt>{escaped(term)}</dt><dd>{escaped(said)}</dd>" for term, said in items.items())
    return f"<dl>{pairs}</dl>"


def paragraph(text: str, kind: str = "") -> str:
    """Return a paragraph."""
    return f'<p class="{kind}">{escaped(text)}</p>' if kind else f"<p>{escaped(text)}</p>"
