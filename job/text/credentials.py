"""Credentials as editors, shells and files leave them: with line ends, spaces or quotes that are no part of them."""

from __future__ import annotations

from job.errors import JobError

_NAMES = {"\r": "a carriage return", "\n": "a line break", " ": "a space", "\t": "a tab", '"': "quotes", "'": "quotes"}


def require_clean(value: str, source: str, error: type[JobError]) -> None:
    """Refuse a credential that no server would accept; the message does not hold it.

    Args:
        value: The credential.
        source: The variable or file that it comes from.
        error: Raised if it is refused.

    Raises:
        JobError: It holds white space, quotes around it, or what is not ASCII.
    """
    quotes = [end for end in value[:1] + value[-1:] if end in "\"'"]
    stray = next((char for char in value if not "!" <= char <= "~"), quotes[0] if quotes else None)
    if stray is not None:
        what = _NAMES.get(stray, "a character that is not ASCII" if stray > "~" else "a control character")
        raise error(f"{source} holds {what}, which cannot be part of a key or token", remedy="set it again without")
