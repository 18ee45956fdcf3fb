"""The lease: one runner at a time writes to a mirror, always by replacing the head.

The head is the mirror's one mutable object: it names the lease and all files. Every write replaces it by
compare-and-swap. Taking the lease replaces it, too, so the former runner's next write fails. Clocks of two machines are
never compared: the server's clock gives the head's age, and a monotonic clock times the wait.
"""

from __future__ import annotations

import random
import socket
import threading
import time
import uuid
from collections.abc import Callable, Collection, Mapping
from typing import Any

from job import __version__
from job.errors import HeldError
from job.mirror.records import HEAD, VERSION, Head, Lease, decode_head, foreign
from job.mirror.store import ConflictError, MirrorStore, Stored
from job.system.clock import now
from job.system.failpoints import reached
from job.system.processes import process_namespace, this_process
from job.text.redaction import redacted

# Retries after a faster runner or a lost response.
_LOOKS = 5
_REMEDY = "let one run continue this job; this run stops before it writes again"

Change = Callable[[Head], tuple[Mapping[str, Any], Collection[str]]]


class LeaseLostError(HeldError):
    """Another runner took the lease, or the mirror was removed."""


class Holding:
    """This runner's lease of one mirror; thread-safe. `confirmed` is when the last request to prove it began."""

    def __init__(self, store: MirrorStore, head: Head, stored: Stored, confirmed: float) -> None:
        self._store, self._stored = store, stored
        self.head, self.confirmed = head, confirmed
        self.lost: LeaseLostError | None = None
        self._lock = threading.Lock()

    def update(self, change: Change = lambda _: ({}, ()), *, release: bool = False) -> None:
        """Replace the head, which is also a heartbeat; none follows after release.

        `change` returns the changed fields and the objects to remove. Raises LeaseLostError, with nothing written, or
        DeliveryError; then the next call shows whether it was written.
        """
        with self._lock:
            for _ in range(_LOOKS):
                if self.lost is not None:
                    raise self.lost
                if self.head.lease.released and not release:
                    return  # a waiting heartbeat must not undo the release
                begun = now()
                fields, remove = change(self.head)
                lease = self.head.lease.model_copy(update={"beat": self.head.lease.beat + 1, "released": release})
                head = self.head.model_copy(update={**fields, "lease": lease})
                try:
                    self._stored = self._store.replace(head.job_id, head.encode(), self._stored, remove)
                except ConflictError as conflict:
                    if not self._adopt(conflict.found, head):
                        continue
                self.head, self.confirmed = head, begun
                reached("lease:released" if release else "lease:renewed")
                return
            self.lost = LeaseLostError(f"the lease of job {self.head.job_id} keeps changing", remedy=_REMEDY)
            raise self.lost

    def _adopt(self, found: Stored | None, wanted: Head) -> bool:
        """Adopt our own head whose response was lost; return whether it is the wanted one. Raises LeaseLostError."""
        theirs = decode_head(found.data, wanted.job_id, self._store.uri) if found else None
        if found is None or theirs is None or theirs.lease.runner != wanted.lease.runner:
            who = f"{theirs.lease.describe()} has taken it over" if theirs else "the checkpoint has been removed"
            self.lost = LeaseLostError(
                f"the lease of job {wanted.job_id} at {self._store.uri} is lost: {who}",
                remedy=_REMEDY,
                elsewhere=theirs is not None and not theirs.lease.is_near,
            )
            raise self.lost
        self._stored, self.head = found, theirs
        return found.data == wanted.encode()


def _own_lease(store: MirrorStore) -> Lease:
    return Lease(
        runner=uuid.uuid4().hex,
        host=socket.gethostname(),
        process=this_process(),
        namespace=process_namespace(),
        expiry_s=store.pace.expiry_s,
    )


def _first_head(job: str, identity: Mapping[str, Any], lease: Lease, writer: str) -> Head:
    return Head(
        package=__version__,
        job_id=job,
        identity=dict(identity),
        generation=0,
        lease=lease,
        writer=writer,
        files={},
    )


def take(store: MirrorStore, job: str, identity: Mapping[str, Any], writer: str, say: Callable[[str], None]) -> Holding:
    """Take the lease of a job's mirror, created if missing; `writer` is the run folder's lineage.

    Raises HeldError for a live runner, MirrorError for a damaged or another job's mirror, or DeliveryError.
    """
    lease = _own_lease(store)
    for look in range(_LOOKS):
        if look:
            time.sleep(random.uniform(0.05, 0.2))
        found = store.read(job)
        if found is None:
            if names := store.names(job):
                raise foreign(store.uri, job, names)
            head = _first_head(job, identity, lease, writer)
        else:
            _check(store, job, identity, found)
            found = wait_until_free(store, job, found, say)
            if found is None:
                continue
            # Another runner may have written a last snapshot and left.
            changes = {"version": VERSION, "package": __version__, "lease": lease}
            head = decode_head(found.data, job, store.uri).model_copy(update=changes)
        begun = now()
        try:
            stored = store.replace(job, head.encode(), found, ())
        except ConflictError as conflict:
            if conflict.found is None or conflict.found.data != head.encode():
                continue
            stored = conflict.found
        reached("lease:taken")
        return Holding(store, head, stored, begun)
    raise HeldError(f"other runs keep taking job {job} at {store.uri}", remedy="let one run continue this job")


def _check(store: MirrorStore, job: str, identity: Mapping[str, Any], found: Stored) -> None:
    head = decode_head(found.data, job, store.uri)
    if redacted(head.identity) != redacted(identity):
        raise foreign(store.uri, job, [f"{HEAD} of another job"])
    known = {f"objects/{name}" for name in (*head.objects, *head.previous)}
    if odd := [name for name in store.names(job) if name not in known and not name.startswith("objects/")]:
        raise foreign(store.uri, job, odd)


def wait_until_free(store: MirrorStore, job: str, found: Stored, say: Callable[[str], None]) -> Stored | None:
    """Return the head once its lease is released, dead or expired; None if it was removed. Raises HeldError."""
    lease = decode_head(found.data, job, store.uri).lease
    if lease.released or lease.is_dead:
        return found
    if lease.is_near:
        raise _held_error(store, job, lease)
    # Its age at first by the server's clock; then by ours, which is monotonic.
    begun = now() - (found.age_s or 0.0)
    left = lease.expiry_s - (now() - begun)
    if left > 0:
        say(f"job {job} was last held by {lease.describe()}: waiting for its lease to expire, {left:.0f} s at most")
    while (left := lease.expiry_s - (now() - begun)) > 0:
        time.sleep(min(left, store.pace.poll_s))
        latest = store.read(job)
        if latest is None:
            return None
        if latest.data != found.data:
            lease = decode_head(latest.data, job, store.uri).lease
            if lease.released:
                return latest
            raise _held_error(store, job, lease)
    return found


def is_running(head: Head, stored: Stored) -> bool:
    """Return whether a job seems to be running, without waiting for a heartbeat."""
    if head.lease.released or head.lease.is_dead:
        return False
    return head.lease.is_near or stored.age_s is None or stored.age_s <= head.lease.expiry_s


def _held_error(store: MirrorStore, job: str, lease: Lease) -> HeldError:
    return HeldError(
        f"job {job} is held by {lease.describe()} (checkpoint {store.uri})",
        remedy="wait for it to end or stop it",
        elsewhere=not lease.is_near,
    )
