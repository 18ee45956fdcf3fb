"""Send snapshots of a run folder to its mirror in the background, on request."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

from job.errors import DeliveryError, JobError
from job.mirror.backoff import FIRST_RETRY_S, Trouble
from job.mirror.layers import LAYERED, SMALL_BYTES, Layers
from job.mirror.lease import Holding, LeaseLostError
from job.mirror.records import CACHES, LINEAGE, STUDY, Head, Layered, Lineage, MirroredFile, excess, objects_of
from job.mirror.snapshot import Snapshots, Taken
from job.mirror.store import MirrorStore
from job.storage.atomic import write_record
from job.storage.run_folder import RunFolder
from job.system.clock import now
from job.system.failpoints import reached

# Copying a large study takes a core for a second: such copies take a fifth of the time at most.
_RESTS, _LONGEST_REST_S = 4.0, 10.0
# Caches above this size may be omitted from a last snapshot with only seconds left.
_LARGE_BYTES = 8 << 20


class _CutShortError(Exception):
    """The run ends: send essential files before caches."""


class SnapshotSender:
    """Daemon thread that keeps a mirror up to date; `trouble` tracks failing snapshots."""

    def __init__(
        self,
        store: MirrorStore,
        holding: Holding,
        folder: RunFolder,
        say: Callable[[str], None],
        sent: Callable[[], None],
    ) -> None:
        """Prepare without starting; `say` receives failures; `sent` is called after every success."""
        self._store, self._holding, self._folder, self._sent = store, holding, folder, sent
        self._snapshots, self._layers = Snapshots(folder), Layers()
        self.trouble = Trouble(f"the checkpoint {store.uri}", say)
        # Not a condition: a stop signal raised in the main thread within its lock would leave it locked.
        self._wake: SimpleQueue[None] = SimpleQueue()
        self._wanted = self._stopping = self._hurry = self._discarded = False
        self._ended = threading.Event()
        self._done, self._rest = False, 0.0
        self._thread = threading.Thread(target=self._send, name="mirror", daemon=True)

    def start(self) -> None:
        """Start taking snapshots."""
        self._thread.start()

    def request(self) -> None:
        """Request a snapshot soon; requests during one are merged."""
        if not self._wanted:
            self._wanted = True
            self._wake.put(None)

    def discard(self) -> None:
        """Remove the snapshots on close: the job came to nothing."""
        self._discarded = True

    def close(self, *, final: bool, seconds: float, hurry: bool) -> bool:
        """Take the `final` snapshot and release the lease; return whether that succeeded.

        `hurry` skips large caches.
        """
        self._wanted, self._hurry = final, hurry
        self._stopping = True
        self._wake.put(None)
        if self._thread.ident is None:
            self._thread.start()
        self._thread.join(seconds)
        self._ended.set()
        return self._done

    def _send(self) -> None:
        """Take requested snapshots and the last one, then release the lease."""
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
                self.trouble.passed()
                self._sent()
                pause = max(self._store.pace.snapshot_s - (now() - begun), self._rest)
                if stopping:
                    self._done = True
                    break
            except LeaseLostError:
                break
            except _CutShortError:
                self._wanted, pause = True, 0.0
            except Exception as error:  # a mirror that ends silently would be worse
                self._wanted = wanted or self._wanted
                pause = self.trouble.failed(error)
        self._snapshots.clear()

    def _await_turn(self, pause: float) -> bool:
        """Wait `pause` seconds, less at the end, and until a request; return False at the end."""
        until = now() + pause
        while (left := until - now()) > 0 and not self._stopping:
            self._sleep(left)
        while not self._wanted and not self._stopping:
            self._sleep(None)
        if self._stopping and self.trouble.seconds:
            self._ended.wait(min(pause, FIRST_RETRY_S))
        return not self._ended.is_set()

    def _sleep(self, seconds: float | None) -> None:
        try:
            self._wake.get(timeout=seconds)
        except Empty:
            return  # no request yet

    def _save(self, *, release: bool) -> None:
        self._may_send(release=release)
        head, begun = self._holding.head, now()
        have = {entry.sha256: entry for entry in head.files.values()}
        taken = self._snapshots.take(have.keys())
        self._rest = min(_RESTS * (now() - begun), _LONGEST_REST_S)
        trials = _counted(taken, head)
        if release and self._hurry:
            taken = {path: file for path, file in taken.items() if not _may_wait(path, file)}
        files, sources = self._entries_and_objects(taken, have, head)
        folder = Lineage.model_validate_json((self._folder.path / LINEAGE).read_bytes()).folder
        if files == head.files and head.writer == folder:
            if release:
                self._holding.update(release=True)
            return
        self._store.stage(head.job_id, sources, lambda: self._may_send(release=release))
        reached("snapshot:staged")

        def change(head: Head) -> tuple[Mapping[str, Any], Collection[str]]:
            if head.files == files and head.writer == folder:
                return {}, ()  # an earlier try, whose response was lost
            # Recorded first: a crash after the head's replacement must not make this folder look outdated.
            write_record(self._folder.path / LINEAGE, Lineage(folder=folder, generation=head.generation + 1))
            named = objects_of(files).keys()
            fields = {
                "trials": trials,
                "generation": head.generation + 1,
                "writer": folder,
                "files": files,
                "previous": tuple(sorted(head.objects.keys() - named)),
            }
            # An earlier try that succeeded may have dropped objects that this one names again.
            return fields, sorted({*head.previous} - named)

        self._holding.update(change, release=release)
        if self.trouble.seconds:
            # Leftovers of failed tries, unreferenced.
            self._store.sweep(head.job_id, self._holding.head.objects.keys() | {*self._holding.head.previous})

    def _entries_and_objects(
        self, taken: Mapping[str, Taken], have: Mapping[str, MirroredFile | Layered], head: Head
    ) -> tuple[dict[str, MirroredFile | Layered], dict[str, tuple[Path, MirroredFile]]]:
        """Return a snapshot's entries, and the objects to send."""
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
            if large := excess(path, files[path]):  # restoring would refuse it
                raise DeliveryError(
                    f"the checkpoint would exceed its limit: {large}", remedy="check that file in the run folder"
                )
        return files, sources

    def _empty(self, *, release: bool) -> None:
        """Write a head without files: no other job mistakes it for its own."""

        def change(head: Head) -> tuple[Mapping[str, Any], Collection[str]]:
            return {"files": {}, "trials": None, "previous": ()}, sorted({*head.objects, *head.previous})

        self._holding.update(change, release=release)

    def _may_send(self, *, release: bool) -> None:
        if self._holding.lost is not None:
            raise self._holding.lost
        if self._hurry and not release:
            raise _CutShortError


def _may_wait(path: str, file: Taken) -> bool:
    return file.source is not None and file.size > _LARGE_BYTES and Path(path).parts[0] in CACHES


def _counted(taken: Mapping[str, Taken], head: Head) -> int | None:
    """Return a snapshot's finished trials. Raises JobError if they became fewer: the study is damaged."""
    study = taken.get(STUDY)
    if study is None and STUDY not in head.files:
        return None
    trials = study.trials if study is not None else 0
    if trials is None:
        return head.trials  # unchanged
    if trials < (head.trials or 0):
        raise JobError(
            f"the local study holds {trials} trials, the checkpoint {head.trials}: the checkpoint is not overwritten",
            remedy="run the same command again to restore the study",
        )
    return trials
