"""Which mirror, and how it is kept."""

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
    """How often a mirror is written.

    Attributes:
        beat_s: Seconds between signs of life.
        expiry_s: Seconds of silence after which another runner may take over.
        snapshot_s: Seconds between two snapshots at least, the last one excepted.
        poll_s: Seconds between two looks at a lease that may be stale.

    Raises:
        UsageError: A lease would run out between two signs of life.
    """

    beat_s: float = 20.0
    expiry_s: float = 120.0
    snapshot_s: float = 1.0
    poll_s: float = 5.0

    def __post_init__(self) -> None:
        if not 0 < self.beat_s <= self.expiry_s / 2:
            raise UsageError("a lease needs at least two signs of life before it expires")


# Names four numbers for tests: beat_s,expiry_s,snapshot_s,poll_s.
PACE = "JOB_CHECKPOINT_PACE"

# The Hub counts commits by the hour: one a minute at most, and signs of life count.
HUB_PACE = SnapshotPace(beat_s=120.0, expiry_s=360.0, snapshot_s=60.0, poll_s=15.0)


@dataclass(frozen=True)
class MirrorOptions:
    """How to reach a mirror and how to keep it.

    Attributes:
        required: Stop the job where the mirror stays down, instead of going on without.
        pace: How often it is written; None: what suits the kind of server.
        s3: How to reach an S3 server; None: as boto3 finds it.
        token: For the Hub; None: HF_TOKEN or the client's own store.
    """

    required: bool = False
    pace: SnapshotPace | None = None
    s3: S3Options | None = None
    token: str | None = field(default=None, repr=False)


def pace_as_told() -> SnapshotPace | None:
    """Return the pace that the environment names, None if it names none."""
    told = os.environ.get(PACE)
    return SnapshotPace(*map(float, told.split(","))) if told else None


def scheme_of(uri: str) -> str:
    """Return "file", "hf" or "s3".

    Raises:
        UsageError: The URI names no mirror.
    """
    match = _URI.fullmatch(uri)
    if match is None:
        raise UsageError(
            f"{uri!r} names no checkpoint", remedy="use file:///absolute/folder, hf://user/repo or s3://bucket/prefix"
        )
    return next(name for name in match.groups() if name)
