"""Harmless prompts that the model is likely to decline or to answer, one per line."""

from __future__ import annotations

from importlib import resources

KINDS = ("good", "bad")


def candidates(kind: str) -> list[str]:
    """Return the prompts of a kind: "bad" ones need hands, a phone, an account or a device, "good" ones do not.

    Their order is random and fixed: any slice is a fair sample.
    """
    text = resources.files("job.realmodel").joinpath("prompts", f"{kind}.txt").read_text("utf-8")
    return text.splitlines()
