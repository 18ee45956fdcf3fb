"""Whose instance is it: a creation that was not confirmed is found again, whatever became of its label."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Literal

from job.cloud.provider import Instance
from job.records import Record

Claim = Literal["sure", "likely"]
# Labels of launches; those of other launches are never this one's.
_LABEL = re.compile(r"abliterate-[0-9a-f]{8}-\d+")


class Pending(Record):
    """A creation that was asked for and whose answer is not known.

    Attributes:
        label: The instance's label, and the value of its marker.
        at: Unix time of the request.
        offer: The offer, for people.
        dollars: Price of an hour by the offer.
        before: Ids of all instances of the account right before; None: not known.
    """

    label: str
    at: float = 0.0
    offer: str = ""
    dollars: float = 0.0
    before: tuple[str, ...] | None = None


def claim(
    instance: Instance, pending: Pending, *, launch: str, image: str, others: Collection[str] = ()
) -> Claim | None:
    """Return how certain it is that an instance is the one of a pending creation, None if it is not.

    Args:
        instance: From the list of all instances.
        pending: The creation.
        launch: Label of the launch, with which the creation's own begins.
        image: The image that was asked for.
        others: Ids that belong to other rentals for certain.
    """
    if instance.state == "gone":
        return None
    if instance.marker:
        return "sure" if instance.marker == pending.label else None
    if instance.label == pending.label:
        return "sure"
    if pending.before is None or instance.id in pending.before or instance.id in others:
        return None
    shown, whole = _plain(instance.label), _plain(pending.label)
    if shown and whole.startswith(shown) and shown.startswith(_plain(launch)):
        return "sure"  # the label was cut, behind what no other launch has
    if _LABEL.fullmatch(instance.label) or (instance.image and _same(instance.image) != _same(image)):
        return None
    if shown and not whole.startswith(shown) and not instance.image:
        return None  # somebody else's name, and nothing that speaks for us
    return "likely"


def _plain(label: str) -> str:
    return re.sub(r"[^a-z0-9]", "", label.lower())


def _same(image: str) -> str:
    return image.removeprefix("docker.io/").removeprefix("library/").removesuffix(":latest")
