"""The mirror of a run folder elsewhere, from which a fresh machine continues, and its lease.

Under the URI each job has JOB_ID/head.json, the only mutable document, and JOB_ID/objects/, which are immutable.
Heartbeats and snapshots both replace the head by compare-and-swap, so a runner that lost the lease cannot write.
Objects exist before the head that names them, and remain for one more snapshot.
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
