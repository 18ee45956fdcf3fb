"""A run's hold on its mirror: signs of life and snapshots in the background, and a word when the lease is lost."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from job.checkpoint.lease import Holding, LeaseLostError, now
from job.checkpoint.options import Pace
from job.checkpoint.records import Entry, Head, Lineage
from job.checkpoint.snapshot import Snapshots, Taken
from job.checkpoint.store import Store
from job.errors import DeliveryError, HeldError, JobError
from job.events import redact
from job.workspace import RunFolder, write_record

LINEAGE = "mirror.json"
_FIRST_RETRY_S, _LONGEST_RETRY_S = 0.5, 60.0
_WATCH_S = 0.25


class Trouble:
    """How long something has been failing; says so at the first failure and then ever more rarely."""

    def __init__(self, what: str, say: Callable[[str], None]) -> None:
        self._what, self._say = what, say
        self._since: float | None = None
        self._next_word, self._failures = 0.0, 0
        self.latest = ""

    @property
    def seconds(self) -> float:
        """Seconds since the first of the failures, 0 while there are none."""
        since = self._since
        return now() - since if since is not None else 0.0

    def failed(self, error: Exception) -> float:
        """Note a failure and return the seconds to wait before the next try."""
        self.latest = redact(error.line if isinstance(error, JobError) else f"{type(error).__name__}: {error}")
        if self._since is None:
            self._since, self._next_word, self._failures = now(), 0.0, 0
        if self.seconds >= self._next_word:
            since = f"has failed for {self.seconds:.0f} s" if self._failures else "fails"
            self._say(f"warning: {self._what} {since}, the job goes on without: {self.latest}")
            self._next_word = max(self.seconds * 2, 10.0)
        self._failures += 1
        wait: float = min(_FIRST_RETRY_S * 2 ** min(self._failures, 30), _LONGEST_RETRY_S)
        return wait * random.uniform(0.5, 1.0)

    def passed(self) -> None:
        """Note a success."""
        if self._since is not None:
            self._say(f"{self._what} works again after {self.seconds:.0f} s")
        self._since = None


class Claim:
    """The lease of one job's mirror, and the threads that keep it and the mirror up.

    Until `start`, only signs of life are given. All threads are daemons: nothing here keeps a process that is to end.
    """

    def __init__(
        self, store: Store, holding: Holding, folder: RunFolder, say: Callable[[str], None], *, required: bool
    ) -> None:
        self._store, self._holding, self._folder, self._say = store, holding, folder, say
        self._required = required
        self._snapshots = Snapshots(folder)
        self._life = Trouble(f"the lease at {store.uri}", say)
        self._sending = Trouble(f"the checkpoint {store.uri}", say)
        self._wake = threading.Condition()
        self._wanted = self._stopping = False
        self._ended = threading.Event()
        self._done = False
        self._outward = 0
        self._on_lost: Callable[[JobError], None] | None = None
        self._sender = threading.Thread(target=self._send, name="mirror", daemon=True)
        self._threads = [
            threading.Thread(target=self._beat, name="lease", daemon=True),
            threading.Thread(target=self._watch, name="lease-watch", daemon=True),
        ]
        self._threads[0].start()

    @property
    def head(self) -> Head:
        """The mirror's head as this run has last written it."""
        return self._holding.head

    @property
    def _pace(self) -> Pace:
        return self._store.pace

    def start(self, on_lost: Callable[[JobError], None] | None = None) -> None:
        """Begin to take snapshots.

        Args:
            on_lost: Called at most once, from another thread, with what `check` raises from then on.
        """
        self._on_lost = on_lost
        self._sender.start()
        self._threads[1].start()

    def request(self) -> None:
        """Ask for a snapshot soon; requests that come while one is under way make one more, and none waits."""
        with self._wake:
            self._wanted = True
            self._wake.notify_all()

    def check(self) -> None:
        """Return at once if the run may go on.

        Raises:
            HeldError: The lease is lost; or, within `outward`, it could not be renewed before it expired, so that
                another run may hold it by now.
            DeliveryError: The mirror is required and has been down for as long as a lease lasts.
        """
        if self._holding.lost is not None:
            raise self._holding.lost
        silent = now() - self._holding.confirmed
        if self._outward and silent > self.head.lease.expiry_s:
            raise HeldError(
                f"the lease of job {self.head.job_id} could not be renewed for {silent:.0f} s: another run may hold it",
                remedy=f"run the same command again once {self._store.uri} can be reached: it continues",
            )
        down = max((self._life, self._sending), key=lambda trouble: trouble.seconds)
        if self._required and down.seconds > self.head.lease.expiry_s:
            raise DeliveryError(
                f"the checkpoint {self._store.uri} has been down for {down.seconds:.0f} s: {down.latest}",
                remedy="run the same command again once it works: it continues; or leave --require-checkpoint out",
            )

    @contextmanager
    def outward(self) -> Iterator[None]:
        """Do within the block what others see, as uploads: there it is not enough that the lease is not known lost.

        Raises:
            HeldError: It is lost or has expired.
            DeliveryError: As for `check`.
        """
        self._outward += 1
        try:
            self.check()
            yield
        finally:
            self._outward -= 1

    def close(self, *, final: bool = True, seconds: float = 60.0) -> bool:
        """Take the last snapshot and release the lease, within so many seconds.

        Args:
            final: Take it; otherwise the lease is released as the mirror stands.
            seconds: How long to wait; what is not done then is given up.

        Returns:
            Whether all of that was done.
        """
        with self._wake:
            self._wanted = self._wanted or final
            self._stopping = True
            self._wake.notify_all()
        if self._sender.ident is None:
            self._sender.start()
        self._sender.join(seconds)
        self._ended.set()
        if not self._done and final and self._holding.lost is None:
            said = self._sending.latest or "the last snapshot is still being sent"
            self._say(f"warning: the checkpoint {self._store.uri} lacks the latest, which is in this folder: {said}")
        return self._done

    def _beat(self) -> None:
        wait = self._pace.beat_s
        while not self._ended.wait(wait):
            # A snapshot is a sign of life, too.
            silent = now() - self._holding.confirmed
            if silent < self._pace.beat_s / 2:
                wait = self._pace.beat_s - silent
                continue
            try:
                self._renew()
                wait = self._pace.beat_s
            except LeaseLostError:
                return
            except Exception as error:  # whatever it is: a lease that runs out silently would be worse
                wait = min(self._life.failed(error), self._pace.beat_s)

    def _renew(self) -> None:
        self._holding.update()
        self._life.passed()

    def _watch(self) -> None:
        while not self._ended.wait(_WATCH_S):
            try:
                self.check()
            except JobError as error:
                if self._on_lost is not None and not self._ended.is_set():
                    self._on_lost(error)
                return

    def _send(self) -> None:
        """Take snapshots as they are asked for, and the last one; then release the lease."""
        pause = 0.0
        while self._await_turn(pause):
            begun = now()
            with self._wake:
                stopping, wanted, self._wanted = self._stopping, self._wanted, False
            try:
                if wanted:
                    self._save(release=stopping)
                elif stopping:
                    self._holding.update(release=True)
                self._sending.passed()
                self._life.passed()
                pause = self._pace.snapshot_s - (now() - begun)
                if stopping:
                    self._done = True
                    break
            except LeaseLostError:
                break
            except Exception as error:  # whatever it is: a mirror that ends silently would be worse
                with self._wake:
                    self._wanted = wanted or self._wanted
                pause = self._sending.failed(error)
        self._snapshots.clear()

    def _await_turn(self, pause: float) -> bool:
        """Wait until there is something to do, but for so many seconds first; return False where all is over.

        The end does not wait for its turn, and after a failure not for long.
        """
        until = now() + pause
        with self._wake:
            while (left := until - now()) > 0 and not self._stopping:
                self._wake.wait(left)
            while not self._wanted and not self._stopping:
                self._wake.wait()
        if self._stopping and self._sending.seconds:
            self._ended.wait(min(pause, _FIRST_RETRY_S))
        return not self._ended.is_set()

    def _save(self, *, release: bool) -> None:
        """Take a snapshot and have the head name it."""
        head = self.head
        have = {entry.sha256: entry for entry in head.files.values()}
        taken = self._snapshots.take(have.keys())
        files, sources = _named(taken, have, head)
        folder = Lineage.model_validate_json((self._folder.path / LINEAGE).read_bytes()).folder
        if files == head.files and head.writer == folder:
            if release:
                self._holding.update(release=True)
            return
        self._store.stage(head.job_id, sources)

        def change(head: Head) -> tuple[Mapping[str, Any], Collection[str]]:
            if head.files == files and head.writer == folder:
                return {}, ()  # an earlier try, whose answer got lost
            # Noted before: a crash right after the head is replaced must not make this folder look behind.
            write_record(self._folder.path / LINEAGE, Lineage(folder=folder, generation=head.generation + 1))
            named = {entry.object for entry in files.values()}
            fields = {
                "generation": head.generation + 1,
                "writer": folder,
                "files": files,
                "previous": tuple(sorted(head.objects.keys() - named)),
            }
            # An earlier try that did arrive may have dropped what this one names again.
            return fields, sorted({*head.previous} - named)

        self._holding.update(change, release=release)


def _named(
    taken: Mapping[str, Taken], have: Mapping[str, Entry], head: Head
) -> tuple[dict[str, Entry], dict[str, tuple[Any, Entry]]]:
    """Return the entries of a snapshot, and the objects that have to be sent for it."""
    known, files, sources = dict(have), {}, {}
    for path, file in taken.items():
        if file.sha256 not in known:
            name = f"{file.sha256}.{head.generation + 1}-{head.lease.runner[:8]}"
            known[file.sha256] = Entry(sha256=file.sha256, size=file.size, object=name)
            assert file.source is not None
            sources[name] = (file.source, known[file.sha256])
        files[path] = known[file.sha256]
    return files, sources
