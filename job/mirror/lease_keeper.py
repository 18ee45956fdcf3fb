"""A run's hold on its mirror: signs of life and snapshots in the background, and a word when the lease is lost."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

from job.errors import DeliveryError, HeldError, JobError
from job.mirror.backoff import FIRST_RETRY_S, Trouble
from job.mirror.layers import LAYERED, SMALL_BYTES, Layers
from job.mirror.lease import Holding, LeaseLostError, now
from job.mirror.options import SnapshotPace
from job.mirror.records import CACHES, STUDY, Head, Layered, Lineage, MirroredFile, excess, objects_of
from job.mirror.snapshot import Snapshots, Taken
from job.mirror.store import MirrorStore
from job.storage.atomic import write_record
from job.storage.run_folder import RunFolder
from job.system.failpoints import reached

LINEAGE = "mirror.json"
_WATCH_S = 0.25
# Copying a study of many trials takes a core for a second: such copies take a fifth of the time at most.
_RESTS, _LONGEST_REST_S = 4.0, 10.0
# Caches of more than this may be left out of a last snapshot for which there are only seconds left.
_LARGE_BYTES = 8 << 20


class _CutShortError(Exception):
    """The run ends: what matters is to be sent before what is merely dear to compute again."""


class Claim:
    """The lease of one job's mirror, and the threads that keep it and the mirror up.

    Until `start`, only signs of life are given. All threads are daemons: nothing here keeps a process that is to end.
    """

    def __init__(
        self, store: MirrorStore, holding: Holding, folder: RunFolder, say: Callable[[str], None], *, required: bool
    ) -> None:
        self._store, self._holding, self._folder, self._say = store, holding, folder, _heard(say)
        self._required = required
        self._snapshots, self._layers = Snapshots(folder), Layers()
        self._life = Trouble(f"the lease at {store.uri}", self._say)
        self._sending = Trouble(f"the checkpoint {store.uri}", self._say)
        # Not a condition: a stop signal that is raised in the main thread just within its lock would leave it locked.
        self._wake: SimpleQueue[None] = SimpleQueue()
        self._wanted = self._stopping = self._hurry = self._discarded = False
        self._ended = threading.Event()
        self._done, self._rest = False, 0.0
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
    def _pace(self) -> SnapshotPace:
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
        if not self._wanted:
            self._wanted = True
            self._wake.put(None)

    def discard(self) -> None:
        """Have the mirror forget its snapshots when this is closed: the job came to nothing."""
        self._discarded = True

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
        if now() - self._holding.confirmed > self.head.lease.expiry_s:
            try:
                self._renew()  # after a sleep of this process nothing but that may be missing
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
        """Take the last snapshot and release the lease, within so many seconds.

        Args:
            final: Take it; otherwise the lease is released as the mirror stands.
            hurry: Leave out large caches that have not arrived, and break off what is under way for them: for a
                machine that is about to be taken away.
            seconds: How long to wait; what is not done then is given up.

        Returns:
            Whether all of that was done.
        """
        self._wanted, self._hurry = final, hurry
        self._stopping = True
        self._wake.put(None)
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
                if self._on_lost is not None and not self._stopping:
                    self._on_lost(error)
                return

    def _send(self) -> None:
        """Take snapshots as they are asked for, and the last one; then release the lease."""
        pause = 0.0
        while self._await_turn(pause):
            begun = now()
            stopping, wanted, self._wanted = self._stopping, self._wanted, False
            try:
                if self._discarded:
                    self._empty(release=stopping)
                elif wanted:
                    self._save(release=stopping)
                elif stopping:
                    self._holding.update(release=True)
                self._sending.passed()
                self._life.passed()
                pause = max(self._pace.snapshot_s - (now() - begun), self._rest)
                if stopping:
                    self._done = True
                    break
            except LeaseLostError:
                break
            except _CutShortError:
                self._wanted, pause = True, 0.0
            except Exception as error:  # whatever it is: a mirror that ends silently would be worse
                self._wanted = wanted or self._wanted
                pause = self._sending.failed(error)
        self._snapshots.clear()

    def _await_turn(self, pause: float) -> bool:
        """Wait until there is something to do, but for so many seconds first; return False where all is over.

        The end does not wait for its turn, and after a failure not for long.
        """
        until = now() + pause
        while (left := until - now()) > 0 and not self._stopping:
            self._sleep(left)
        while not self._wanted and not self._stopping:
            self._sleep(None)
        if self._stopping and self._sending.seconds:
            self._ended.wait(min(pause, FIRST_RETRY_S))
        return not self._ended.is_set()

    def _sleep(self, seconds: float | None) -> None:
        try:
            self._wake.get(timeout=seconds)
        except Empty:
            return  # nobody has asked for anything

    def _save(self, *, release: bool) -> None:
        """Take a snapshot and have the head name it."""
        self._may_send(release=release)
        head, begun = self.head, now()
        have = {entry.sha256: entry for entry in head.files.values()}
        taken = self._snapshots.take(have.keys())
        self._rest = min(_RESTS * (now() - begun), _LONGEST_REST_S)
        trials = _counted(taken, head)
        if release and self._hurry:
            taken = {path: file for path, file in taken.items() if not _may_wait(path, file)}
        files, sources = self._named(taken, have, head)
        folder = Lineage.model_validate_json((self._folder.path / LINEAGE).read_bytes()).folder
        if files == head.files and head.writer == folder:
            if release:
                self._holding.update(release=True)
            return
        self._store.stage(head.job_id, sources, lambda: self._may_send(release=release))
        reached("snapshot:staged")

        def change(head: Head) -> tuple[Mapping[str, Any], Collection[str]]:
            if head.files == files and head.writer == folder:
                return {}, ()  # an earlier try, whose answer got lost
            # Noted before: a crash right after the head is replaced must not make this folder look behind.
            write_record(self._folder.path / LINEAGE, Lineage(folder=folder, generation=head.generation + 1))
            named = objects_of(files).keys()
            fields = {
                "trials": trials,
                "generation": head.generation + 1,
                "writer": folder,
                "files": files,
                "previous": tuple(sorted(head.objects.keys() - named)),
            }
            # An earlier try that did arrive may have dropped what this one names again.
            return fields, sorted({*head.previous} - named)

        self._holding.update(change, release=release)
        if self._sending.seconds:
            # What failed tries have left that no head names.
            self._store.sweep(head.job_id, self.head.objects.keys() | {*self.head.previous})

    def _named(
        self, taken: Mapping[str, Taken], have: Mapping[str, MirroredFile | Layered], head: Head
    ) -> tuple[dict[str, MirroredFile | Layered], dict[str, tuple[Path, MirroredFile]]]:
        """Return the entries of a snapshot, and the objects that have to be sent for it."""
        known, files = dict(have), {}
        sources: dict[str, tuple[Path, MirroredFile]] = {}
        end = f"{head.generation + 1}-{head.lease.runner[:8]}"
        for path, file in taken.items():
            if file.sha256 not in known:
                assert file.source is not None
                if path in LAYERED and file.size >= SMALL_BYTES:
                    made = self._layers.make(path, file.source, file.sha256, head.files.get(path), end)
                    known[file.sha256] = made.entry
                    sources[made.layer.object] = (made.source, made.layer)
                else:
                    entry = MirroredFile(sha256=file.sha256, size=file.size, object=f"{file.sha256}.{end}")
                    known[file.sha256] = entry
                    sources[entry.object] = (file.source, entry)
            files[path] = known[file.sha256]
            if large := excess(path, files[path]):  # nobody would take it from there
                raise DeliveryError(f"the checkpoint would have {large}", remedy="look at that file in the run folder")
        return files, sources

    def _empty(self, *, release: bool) -> None:
        """Leave a head that names nothing: no other job takes it for one."""

        def change(head: Head) -> tuple[Mapping[str, Any], Collection[str]]:
            return {"files": {}, "trials": None, "previous": ()}, sorted({*head.objects, *head.previous})

        self._holding.update(change, release=release)

    def _may_send(self, *, release: bool) -> None:
        if self._holding.lost is not None:
            raise self._holding.lost
        if self._hurry and not release:
            raise _CutShortError


def _heard(say: Callable[[str], None]) -> Callable[[str], None]:
    """Return a way to say things from threads that have to go on, whatever becomes of the log."""

    def heard(message: str) -> None:
        try:
            say(message)
        except JobError as error:  # the disk is full, or the folder is gone
            print(f"{message} ({error.line})", file=sys.stderr, flush=True)

    return heard


def _may_wait(path: str, file: Taken) -> bool:
    return file.source is not None and file.size > _LARGE_BYTES and Path(path).parts[0] in CACHES


def _counted(taken: Mapping[str, Taken], head: Head) -> int | None:
    """Return how many finished trials the study of a snapshot holds, None where it has none.

    Raises:
        JobError: They are fewer than in the snapshot before: the study here is damaged.
    """
    study = taken.get(STUDY)
    if study is None and STUDY not in head.files:
        return None
    trials = study.trials if study is not None else 0
    if trials is None:
        return head.trials  # it has not changed
    if trials < (head.trials or 0):
        raise JobError(
            f"the study here holds {trials} trials, its checkpoint {head.trials}: the checkpoint is left as it is",
            remedy="run the same command again: the study is restored",
        )
    return trials
