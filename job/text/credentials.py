"""Credentials as editors, shells and files leave them: with line ends, spaces or quotes that are no part of them."""

from __future__ import annotations

from job.errors import JobError

_NAMES = {"\r": "a carriage return", "\n": "a line break", " ": "a space", "\t": "a tab", '"': "quotes", "'": "quotes"}


def require_clean(value: str, source: str, error: type[JobError]) -> None:
    """Raise `error` if a credential has white space, outer quotes or non-ASCII characters; the message omits it."""
    quotes = [end for end in value[:1] + value[-1:] if end in "\"'"]
    stray = next((char for char in value if not "!" <= char <= "~"), quotes[0] if quotes else None)
    if stray is not None:
        what = _NAMES.get(stray, "a character that is not ASCII" if stray > "~" else "a control character")
        raise error(f"{source} holds {what}, which cannot be part of a key or token", remedy="set it again without")
