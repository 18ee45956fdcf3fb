"""Names of things as others spell them."""

from __future__ import annotations

import re


def letters_and_digits(name: str) -> str:
    """Return a name without case, spaces and punctuation: "RTX-4090" and "rtx 4090" are one."""
    return re.sub(r"[^a-z0-9]", "", name.lower())
