"""Harmless prompts that the model is likely to decline or to answer, one per line."""

from __future__ import annotations

from importlib import resources

KINDS = ("good", "bad")


def candidates(kind: str) -> list[str]:
    """Return "bad" prompts (for hands, a phone, an account or a device) or "good" ones, in a fixed random order."""
    text = resources.files("job.realmodel").joinpath("prompts", f"{kind}.txt").read_text("utf-8")
    return text.splitlines()
