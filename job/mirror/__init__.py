"""The mirror of a run folder somewhere else, from which a fresh machine goes on, and the lease that comes with it.

Under the URI each job has JOB_ID/head.json, the one document that changes, and JOB_ID/objects/, contents that never do.
Signs of life and snapshots are both replacements of the head by compare-and-swap, so that a runner which has lost the
lease cannot write either. Objects are there before the head that names them, and stay for one snapshot longer.
"""

from job.mirror.lease_keeper import LeaseKeeper
from job.mirror.mirror import HOLDS, Fetched, Mirror, expected_bytes, open_mirror
from job.mirror.options import MirrorOptions, SnapshotPace, scheme_of
from job.mirror.records import Head, MirrorError
from job.mirror.snapshot import held_bytes
from job.mirror.store import Proof

__all__ = [
    "HOLDS",
    "Fetched",
    "Head",
    "LeaseKeeper",
    "Mirror",
    "MirrorError",
    "MirrorOptions",
    "Proof",
    "SnapshotPace",
    "expected_bytes",
    "held_bytes",
    "open_mirror",
    "scheme_of",
]
