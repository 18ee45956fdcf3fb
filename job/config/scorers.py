"""Names of the scorers of responses: built-in ones and those of installed packages."""

from __future__ import annotations

from importlib import metadata

BUILTIN_SCORERS = ("markers", "soft", "degenerate", "nli")

# Entry points of other packages' scorers, see `job.scoring.detectors`.
SCORERS_GROUP = "abliteration_job.scorers"


def known_scorers() -> list[str]:
    """Return the names of all scorers: built-in ones and those of installed packages."""
    return [*BUILTIN_SCORERS, *sorted(metadata.entry_points(group=SCORERS_GROUP).names - {*BUILTIN_SCORERS})]
