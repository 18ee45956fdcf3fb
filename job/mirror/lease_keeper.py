"""Renew the lease of a run's mirror in the background, and report its loss."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from job.errors import DeliveryError, HeldError, JobError
from job.mirror.backoff import Trouble
from job.mirror.lease import Holding, LeaseLostError
from job.mirror.options import SnapshotPace
from job.mirror.records import Head
from job.mirror.snapshot_sender import SnapshotSender
from job.mirror.store import MirrorStore
from job.storage.run_folder import RunFolder
from job.system.clock import now

_WATCH_S = 0.25


class LeaseKeeper:
    """A job's lease with the daemon threads that renew and watch it. Before `start` it only sends heartbeats."""

    def __init__(
        self, store: MirrorStore, holding: Holding, folder: RunFolder, say: Callable[[str], None], *, required: bool
    ) -> None:
        self._store, self._holding, self._say = store, holding, _ignoring_log_failures(say)
        self._required = required
        self._life = Trouble(f"the lease at {store.uri}", self._say)
        self._sender = SnapshotSender(store, holding, folder, self._say, sent=self._life.passed)
        self._closing, self._ended = False, threading.Event()
        self._outward = 0
        self._on_lost: Callable[[JobError], None] | None = None
        self._watcher = threading.Thread(target=self._watch, name="lease-watch", daemon=True)
        threading.Thread(target=self._send_heartbeats, name="lease", daemon=True).start()

    @property
    def head(self) -> Head:
        """The head as last written by this run."""
        return self._holding.head

    @property
    def _pace(self) -> SnapshotPace:
        return self._store.pace

    def start(self, on_lost: Callable[[JobError], None] | None = None) -> None:
        """Start snapshots; `on_lost` is called at most once, from another thread, with the error of `check`."""
        self._on_lost = on_lost
        self._sender.start()
        self._watcher.start()

    def request(self) -> None:
        """Request a snapshot soon; requests during one are merged."""
        self._sender.request()

    def discard(self) -> None:
        """Remove the snapshots on close: the job came to nothing."""
        self._sender.discard()

    def check(self) -> None:
        """Raise HeldError if the lease is lost, or DeliveryError if a required mirror was down for its duration.

        Within `outward`, an expired lease counts as lost.
        """
        if self._holding.lost is not None:
            raise self._holding.lost
        silent = now() - self._holding.confirmed
        if self._outward and silent > self.head.lease.expiry_s:
            raise HeldError(
                f"the lease of job {self.head.job_id} could not be renewed for {silent:.0f} s: another run may hold it",
                remedy=f"once {self._store.uri} is reachable, run the same command again to continue",
            )
        down = max((self._life, self._sender.trouble), key=lambda trouble: trouble.seconds)
        if self._required and down.seconds > self.head.lease.expiry_s:
            raise DeliveryError(
                f"the checkpoint {self._store.uri} has been unreachable for {down.seconds:.0f} s: {down.latest}",
                remedy="run the same command again once it is reachable, or leave out --require-checkpoint",
            )

    @contextmanager
    def outward(self) -> Iterator[None]:
        """Context for public actions such as uploads, which need a valid lease. Raises like `check`."""
        if now() - self._holding.confirmed > self.head.lease.expiry_s:
            try:
                self._renew()  # after a suspend only a renewal may be missing
            except LeaseLostError:
                raise
            except DeliveryError as error:
                self._life.failed(error)
        self._outward += 1
        try:
            self.check()
            yield
        finally:
            self._outward -= 1

    def close(self, *, final: bool = True, seconds: float = 60.0, hurry: bool = False) -> bool:
        """Take the `final` snapshot and release the lease within `seconds`; return whether all succeeded.

        `hurry` skips and aborts large caches, if the machine is about to be reclaimed.
        """
        self._closing = True
        done = self._sender.close(final=final, seconds=seconds, hurry=hurry)
        self._ended.set()
        if not done and final and self._holding.lost is None:
            said = self._sender.trouble.latest or "the last snapshot was not sent in time"
            self._say(f"warning: the checkpoint {self._store.uri} lacks the run folder's latest changes: {said}")
        return done

    def _send_heartbeats(self) -> None:
        wait = self._pace.beat_s
        while not self._ended.wait(wait):
            # A snapshot is a heartbeat too.
            silent = now() - self._holding.confirmed
            if silent < self._pace.beat_s / 2:
                wait = self._pace.beat_s - silent
                continue
            try:
                self._renew()
                wait = self._pace.beat_s
            except LeaseLostError:
                return
            except Exception as error:  # a lease that expires silently would be worse
                wait = min(self._life.failed(error), self._pace.beat_s)

    def _renew(self) -> None:
        self._holding.update()
        self._life.passed()

    def _watch(self) -> None:
        while not self._ended.wait(_WATCH_S):
            try:
                self.check()
            except JobError as error:
                if self._on_lost is not None and not self._closing:
                    self._on_lost(error)
                return


def _ignoring_log_failures(say: Callable[[str], None]) -> Callable[[str], None]:
    """Wrap `say` for threads that must continue if the log fails."""

    def heard(message: str) -> None:
        try:
            say(message)
        except JobError as error:  # the disk is full, or the folder is gone
            print(f"{message} ({error.line})", file=sys.stderr, flush=True)

    return heard
