"""Text for Markdown, redacted and escaped."""

from __future__ import annotations

import re
from collections.abc import Sequence

from job.errors import one_line
from job.text.redaction import redact

# Markup characters, written as entities, which cannot end a table's cell either.
_MARKS = re.compile(r"[&<>|\\`*\[\]~$]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])|(?<!\S)#|^[=+-]")
_NUMBER = re.compile(r"^(\d+)([.)])(?=\s|$)")


def markdown(text: object) -> str:
    """Redact a text and escape it for Markdown, on one line."""
    escaped_marks = _MARKS.sub(lambda found: f"&#{ord(found[0])};", one_line(redact(str(text))))
    return _NUMBER.sub(lambda found: f"{found[1]}&#{ord(found[2])};", escaped_marks)


def markdown_table(rows: Sequence[Sequence[object]]) -> str:
    """Return a Markdown table of cells that are Markdown already; the first row is the head."""
    lines = [f"| {' | '.join(map(str, row))} |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])
