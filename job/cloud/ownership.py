"""Ownership of instances: recognise an unconfirmed creation, even without its label."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Literal

from job.cloud.provider import Instance
from job.records import Record
from job.text.names import letters_and_digits

Claim = Literal["sure", "likely"]
# Labels of launches; other launches' instances are never this one's.
_LABEL = re.compile(r"abliterate-[0-9a-f]{8}-\d+")


class Pending(Record):
    """An unconfirmed creation.

    Attributes:
        label: The instance's label and marker.
        before: Ids of the account's instances right before; None: unknown.
    """

    label: str
    at: float = 0.0
    offer: str = ""
    dollars: float = 0.0
    before: tuple[str, ...] | None = None


def claim(
    instance: Instance, pending: Pending, *, launch: str, image: str, others: Collection[str] = ()
) -> Claim | None:
    """Return how certainly an instance is a pending creation's; `others` are ids of other rentals."""
    if instance.state == "gone":
        return None
    if instance.marker:
        return "sure" if instance.marker == pending.label else None
    if instance.label == pending.label:
        return "sure"
    if pending.before is None or instance.id in pending.before or instance.id in others:
        return None
    shown, whole = letters_and_digits(instance.label), letters_and_digits(pending.label)
    if shown and whole.startswith(shown) and shown.startswith(letters_and_digits(launch)):
        return "sure"  # the label was truncated after a unique prefix
    if _LABEL.fullmatch(instance.label) or (instance.image and _same(instance.image) != _same(image)):
        return None
    if shown and not whole.startswith(shown) and not instance.image:
        return None  # a foreign label without further evidence
    return "likely"


def _same(image: str) -> str:
    return image.removeprefix("docker.io/").removeprefix("library/").removesuffix(":latest")
