"""Names of scorers, of built-in ones and those of installed packages, and how an objective names one."""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib import metadata
from typing import Literal

from job.records import DEFAULT_OBJECTIVES

BUILTIN_SCORERS = ("markers", "soft", "degenerate", "nli", "words", "pattern", "classifier", "judge")
PATTERN = "scoring.pattern"
# The setting that a built-in scorer needs.
NEEDED = {
    "nli": "scoring.nli_model",
    "words": "scoring.words",
    "pattern": PATTERN,
    "classifier": "scoring.classifier",
    "judge": "judge.url",
}
# Measures of change, which read no responses: KL divergence, cross-entropy on `text_prompts`, errors at benchmarks.
CROSS_ENTROPY, TASKS = "cross-entropy", "tasks"
MEASURES = ("kl", CROSS_ENTROPY, TASKS)

# Entry points of other packages' scorers, see `job.scoring.detectors`.
SCORERS_GROUP = "abliteration_job.scorers"

PromptKind = Literal["bad", "good", "both"]
Direction = Literal["fewer", "more"]
_OBJECTIVE = re.compile(r"(?P<scorer>[\w.-]+)(@(?P<prompts>bad|good|both))?(:(?P<direction>fewer|more))?")


@dataclass(frozen=True)
class Objective:
    """An objective that judges responses, SCORER[@PROMPTS][:DIRECTION].

    Attributes:
        name: The objective as it was asked for.
        prompts: Prompts whose responses count; None: the scorer's own.
        direction: Whether fewer or more of them should be found; None: the scorer's own.
    """

    name: str
    scorer: str
    prompts: PromptKind | None = None
    direction: Direction | None = None


def parse_objective(name: str) -> Objective | None:
    """Return the objective with this name; None if it is malformed."""
    found = _OBJECTIVE.fullmatch(name)
    if found is None or (name != found["scorer"] and found["scorer"] in (*DEFAULT_OBJECTIVES, *MEASURES)):
        return None
    return Objective(name, found["scorer"], found["prompts"], found["direction"])  # type: ignore[arg-type]  # by the pattern


def judging(objectives: tuple[str, ...] | list[str]) -> list[Objective]:
    """Return the objectives that judge responses by a scorer, of well-formed ones."""
    found = [parse_objective(name) for name in objectives if name not in (*DEFAULT_OBJECTIVES, *MEASURES)]
    return [one for one in found if one is not None]


def known_scorers() -> list[str]:
    """Return the names of all scorers: built-in ones and those of installed packages."""
    return [*BUILTIN_SCORERS, *sorted(metadata.entry_points(group=SCORERS_GROUP).names - {*BUILTIN_SCORERS})]
