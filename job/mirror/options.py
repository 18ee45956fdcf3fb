"""Options of a mirror: place, pace and access."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from job.errors import UsageError

if TYPE_CHECKING:
    from job.transfer.s3 import S3Options

_URI = re.compile(r"(file)://(?:/.+)|(hf)://[\w.-]+/[\w.-]+(?:@[^@\s]+)?|(s3)://[^/\s?#]+(?:/[^?#]*)?")


@dataclass(frozen=True)
class SnapshotPace:
    """Intervals of a mirror, in seconds. Raises UsageError if a lease expires within two heartbeats.

    Attributes:
        beat_s: Between heartbeats.
        expiry_s: Silence after which another runner may take over.
        snapshot_s: Least interval of snapshots, except the last.
        poll_s: Between checks of a possibly stale lease.
    """

    beat_s: float = 20.0
    expiry_s: float = 120.0
    snapshot_s: float = 1.0
    poll_s: float = 5.0

    def __post_init__(self) -> None:
        if not 0 < self.beat_s <= self.expiry_s / 2:
            raise UsageError("a lease has to be renewed at least twice before it expires")


# For tests: beat_s,expiry_s,snapshot_s,poll_s.
PACE = "JOB_CHECKPOINT_PACE"

# The Hub limits commits per hour: one a minute at most, heartbeats included.
HUB_PACE = SnapshotPace(beat_s=120.0, expiry_s=360.0, snapshot_s=60.0, poll_s=15.0)


@dataclass(frozen=True)
class MirrorOptions:
    """Access to a mirror.

    Attributes:
        required: Stop the job if the mirror stays down.
        token: Hub token; None: HF_TOKEN or the client's own store.
    """

    required: bool = False
    pace: SnapshotPace | None = None
    s3: S3Options | None = None
    token: str | None = field(default=None, repr=False)


def pace_as_told() -> SnapshotPace | None:
    """Return the intervals set in the environment, or None."""
    told = os.environ.get(PACE)
    return SnapshotPace(*map(float, told.split(","))) if told else None


def scheme_of(uri: str) -> str:
    """Return "file", "hf" or "s3". Raises UsageError if the URI names no mirror."""
    match = _URI.fullmatch(uri)
    if match is None:
        raise UsageError(
            f"{uri!r} is not a checkpoint", remedy="use file:///absolute/folder, hf://user/repo or s3://bucket/prefix"
        )
    return next(name for name in match.groups() if name)
