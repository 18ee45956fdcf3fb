"""Names of the scorers that judge answers: the built-in ones and those of installed packages."""

from __future__ import annotations

from importlib import metadata

BUILTIN_SCORERS = ("markers", "soft", "degenerate", "nli")

# Entry points by which other packages add scorers, see `job.scoring.detectors`.
SCORERS_GROUP = "abliteration_job.scorers"


def known_scorers() -> list[str]:
    """Return the names of all scorers: the built-in ones, and those that installed packages add."""
    return [*BUILTIN_SCORERS, *sorted(metadata.entry_points(group=SCORERS_GROUP).names - {*BUILTIN_SCORERS})]
