"""What the card of a base model says of licence and languages, and what of it the Hub takes from another card."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from job.errors import one_line
from job.model.carried_files import licence_files
from job.text.card_header import require_plain_header

_HUB = "https://huggingface.co"
_CARD = "README.md"
_LONGEST, _MOST = 200, 50
# The Hub refuses a card with another value; "other" goes with a `license_name`.
_LICENCES = frozenset(
    re.findall(
        r"\S+",
        """
    apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m
    afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5
    cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0
    cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0
    cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0
    lgpl lgpl-2.1 lgpl-3.0 isc h-research intel-research lppl-1.3c ms-pl apple-ascl apple-amlr mpl-2.0 odc-by odbl
    openmdw-1.0 openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl lgpl-lr deepfloyd-if-license
    fair-noncommercial-research-license llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 grok2-community gemma unknown
    other
    """,
    )
)
_VALID: dict[str, Callable[[str], object]] = {
    "license": _LICENCES.__contains__,
    "license_name": re.compile(r"[a-z0-9][a-z0-9._-]{0,99}").fullmatch,
    "language": re.compile(r"[a-z]{2,3}|code|multilingual").fullmatch,
}
# Files that the Hub takes as a link to a licence.
_LINKED = frozenset({"LICENSE", "LICENSE.md"})
# Places that can stand in the brackets of a link as they are.
URL = re.compile(r"https?://[A-Za-z0-9][A-Za-z0-9.:-]*(/[\w.,~%@+:=?&#/-]*)?", re.ASCII)
PATH = re.compile(r"\w[\w.-]*(/\w[\w.-]*)*", re.ASCII)


@dataclass(frozen=True)
class BaseCard:
    """Facts from a base model's card.

    Attributes:
        metadata: Fields that an export's card takes over.
        licence: What its licence is called, for people; None where nothing says so.
        left_out: Fields that the Hub would refuse, each with its value.
    """

    metadata: dict[str, Any]
    licence: str | None = None
    left_out: tuple[str, ...] = ()


def read_base_card(folder: Path, base_model: str | None = None) -> BaseCard:
    """Return a model card's licence and languages; `base_model` is None if it has no Hub name, or none to show."""
    from huggingface_hub import metadata_load

    card = folder / _CARD
    try:
        if card.is_file():
            require_plain_header(card)
        data = (metadata_load(card) if card.is_file() else None) or {}
    except Exception:  # the client passes on what its YAML library raises
        return BaseCard({}, left_out=("all fields, which cannot be read",))
    metadata: dict[str, Any] = {}
    left_out: list[str] = []
    for name, is_valid in _VALID.items():
        value = data.get(name)
        values = value if isinstance(value, list) else [value] if value else []
        valid = [one for one in values if isinstance(one, str) and is_valid(one)][:_MOST]
        others = [one for one in values[:_MOST] if one not in valid]
        shown = [type(one).__name__ if isinstance(one, list | dict) else one_line(one) for one in others]
        left_out += [f"{name}: {one[:_LONGEST]}" for one in shown]
        if valid:
            metadata[name] = valid if isinstance(value, list) else valid[0]
    if link := _link(data.get("license_link"), folder, base_model):
        metadata["license_link"] = link
    return BaseCard(metadata, _joined_names(data.get("license_name") or data.get("license")), tuple(left_out[:_MOST]))


def _link(link: object, folder: Path, base_model: str | None) -> str | None:
    """Return where a licence is, None where that is no place that an export's card can name."""
    if not isinstance(link, str):
        return None
    if URL.fullmatch(link) or (link in _LINKED and link in licence_files(folder)):
        return link
    # A file of the base's repository that an export does not hold.
    return f"{_HUB}/{base_model}/blob/main/{link}" if base_model and PATH.fullmatch(link) else None


def _joined_names(value: object) -> str | None:
    values = value if isinstance(value, list) else [value]
    return (
        ", ".join(one_line(one)[:_LONGEST] for one in values[:_MOST] if isinstance(one, str) and one_line(one)) or None
    )
