"""How output, reports and cards speak of the removed behaviour."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from job.text.redaction import redact

# A name that fits in a table's head, without markup. A longer description is for the card alone.
_NAME = re.compile(r"[^\W_][^\W_ '-]*(?:[ '-][^\W_]+){0,3}")
_LONGEST = 32
HARMLESS_REFUSAL = "refusal of harmless requests"
# Behaviours whose removal makes a model comply with nothing that it refused; a test compares them with the presets'.
HARMLESS = frozenset({"disclaimers", "flattery", "purple prose"})


@dataclass(frozen=True)
class BehaviourWords:
    """A behaviour in words.

    Attributes:
        counted: Responses with it: "5 refusals".
        elsewhere: The same among responses to prompts without the behaviour.
        shown: What they are, after a count: "5 of 20 refused".
        hidden: What the others are.
        are: The same as a predicate of responses: "5 of 20 are refused".
        shows: What a model does, before a count: "refuses 5 of 20 prompts".
    """

    counted: str
    elsewhere: str
    shown: str
    hidden: str
    are: str
    shows: str

    @property
    def refuses(self) -> bool:
        """Whether the behaviour is a refusal."""
        return self == REFUSAL_WORDS


REFUSAL_WORDS = BehaviourWords("refusals", "false refusals", "refused", "answered", "are refused", "refuses")


def words_of(behaviour: str) -> BehaviourWords:
    """Return the words for a behaviour, which `card.behaviour` names; one that is no short name has general ones."""
    if "refus" in behaviour.casefold():
        return REFUSAL_WORDS
    short = len(behaviour) <= _LONGEST and _NAME.fullmatch(behaviour) and redact(behaviour) == behaviour
    name = behaviour if short else "the behaviour"
    return BehaviourWords(
        counted=name if short else "responses with the behaviour",
        elsewhere=f"{name} on other prompts",
        shown=f"with {name}",
        hidden=f"without {name}",
        are=f"show {name}",
        shows=f"shows {name} on",
    )


def words_in(settings: Mapping[str, Any]) -> BehaviourWords:
    """Return the words for the behaviour of stored settings."""
    return words_of(str(settings.get("card", {}).get("behaviour", "refusal")))
