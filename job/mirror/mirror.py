"""A store of mirrors: list, claim and restore jobs."""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from job.errors import DamagedError, DeliveryError, UsageError
from job.mirror.lease import Holding, is_running, take
from job.mirror.lease_keeper import LeaseKeeper
from job.mirror.options import MirrorOptions, pace_as_told, scheme_of
from job.mirror.proof import holder, overtaken, shortfall
from job.mirror.records import CACHES, LINEAGE, STUDY, Head, Lineage, MirrorError, decode_head
from job.mirror.restore import INCOMING, count_mirrored, download, prove, restore
from job.mirror.store import MirrorStore, Proof
from job.storage.atomic import cannot_write, ensure_folder, write_record
from job.storage.run_folder import JOB_ID, RunFolder
from job.storage.study_file import count_trials, restore_if_damaged

# Shown to people: what a mirror holds and what it never holds.
HOLDS = (
    "the study with its plan, directions, cached residuals, prompts, figures, events and status; no model, no export"
)
_RELEASE_SECONDS = 15.0
_SMALL_BYTES = 2 << 20


@dataclass(frozen=True)
class Fetched:
    """Small files of a job's latest snapshot; `left_out` names untrusted settings dropped from job.json."""

    folder: RunFolder
    head: Head
    running: bool
    left_out: Mapping[str, Any] = field(default_factory=dict)


def open_mirror(uri: str, options: MirrorOptions, report: Callable[[str], None] = lambda _: None) -> Mirror:
    """Return a mirror without connecting. Raises UsageError for a wrong URI, or DeliveryError for credentials."""
    scheme = scheme_of(uri)
    pace = options.pace or pace_as_told()
    store: MirrorStore
    # Each imports a slow client.
    if scheme == "file":
        from job.mirror.folder_store import FileStore

        store = FileStore(uri, pace)
    elif scheme == "hf":
        from job.mirror.hub_store import HubStore

        store = HubStore(uri, options.token, pace, report)
    else:
        from job.mirror.s3_store import S3Store

        store = S3Store(uri, options.s3, pace)
    return Mirror(store, required=options.required)


def expected_bytes(prompts: int, layers: int, width: int, directions: int = 1) -> int:
    """Estimate a mirror's size in bytes: residuals of `prompts` prompts, directions and small files."""
    return (prompts + directions) * layers * width * 4 + _SMALL_BYTES


class Mirror:
    """A store of mirrors; a context manager."""

    def __init__(self, store: MirrorStore, *, required: bool) -> None:
        self._store, self._required = store, required

    @property
    def uri(self) -> str:
        """URI of the store."""
        return self._store.uri

    def __enter__(self) -> Mirror:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close connections."""
        self._store.close()

    def probe(self) -> Proof:
        """Prove that mirrors can be stored here, leaving nothing behind. Raises DeliveryError."""
        return self._store.probe()

    def jobs(self) -> list[Head]:
        """Return all readable heads. Raises DeliveryError if the store cannot be reached."""
        found = []
        for job in filter(JOB_ID.fullmatch, self._store.jobs()):
            try:
                stored = self._store.read(job)
                found += [decode_head(stored.data, job, self.uri)] if stored else []
            except MirrorError:
                continue  # reported when that job is requested
        return found

    def holder(self, job: str) -> str | None:
        """Describe a job's current runner, or None. Raises MirrorError or DeliveryError."""
        stored = self._store.read(job)
        if stored is None:
            return None
        head = decode_head(stored.data, job, self.uri)
        return head.lease.describe() if is_running(head, stored) else None

    def other_holder(self, job: str) -> tuple[str, bool] | None:
        """Return another runner of a job, and whether it is on another machine. Raises MirrorError or DeliveryError."""
        return holder(self._store, job)

    def shortfall(self, folder: RunFolder) -> str:
        """Return what of a run folder is missing here, or ""; reads every object back. Raises JobError or OSError."""
        return shortfall(self._store, folder)

    def overtaken(self, folder: RunFolder) -> str:
        """Return why a mirror continued elsewhere may lack a folder's work, or "". Raises JobError or OSError."""
        return overtaken(self._store, folder)

    def fetch(self, job: str, into: Path, *, whole: bool = False) -> Fetched:
        """Download a job's latest snapshot into a new folder under `into`, without the lease.

        `whole` includes caches. Raises UsageError without such a job, MirrorError if damaged, DeliveryError or
        MachineError.
        """
        for attempt in (1, 2, 3):
            stored = self._store.read(job)
            if stored is None:
                raise UsageError(f"there is no job {job} at {self.uri}", remedy="check --checkpoint and --job")
            head = decode_head(stored.data, job, self.uri)
            small = [path for path in head.files if Path(path).parts[0] not in CACHES or path.endswith(".json")]
            folder = RunFolder(into / job)
            try:
                left_out = self._download(head, list(head.files) if whole else small, folder)
            except OSError as error:
                raise cannot_write(into, error) from error
            except MirrorError:
                # Two snapshots later, the files of this one are gone.
                if attempt == 3:
                    raise
                continue
            return Fetched(folder, head, is_running(head, stored), left_out)
        raise AssertionError("unreachable")

    def _download(self, head: Head, paths: list[str], folder: RunFolder) -> Mapping[str, Any]:
        """Download files of a snapshot, with job.json last and vetted; return what vetting dropped."""
        name = folder.job_file.name
        apart = RunFolder(folder.path / INCOMING)
        left_out: Mapping[str, Any] = {}
        try:
            if name in paths:
                download(self._store, head, [name], apart.path)
                left_out = prove(self._store, head, apart)
            download(self._store, head, [path for path in paths if path != name], folder.path)
            if name in paths:
                apart.job_file.replace(folder.job_file)
        finally:
            shutil.rmtree(apart.path, ignore_errors=True)
        return left_out

    def claim(self, folder: RunFolder, identity: Mapping[str, Any], say: Callable[[str], None]) -> LeaseKeeper:
        """Take a job's lease, update its run folder, and start heartbeats.

        The folder need not exist. If the job was continued elsewhere, it follows; records that only it has are moved
        aside. Raises HeldError for a live runner, MirrorError for a damaged mirror, DeliveryError or MachineError.
        """
        ensure_folder(folder.path)
        self._store.prepare()
        lineage = _lineage(folder)
        plain = json.loads(json.dumps(identity))
        holding = take(self._store, folder.path.name, plain, lineage.folder, say)
        keeper = LeaseKeeper(self._store, holding, folder, say, required=self._required)
        try:
            self._bring_up(holding, folder, lineage, say)
        except BaseException:
            keeper.close(final=False, seconds=_RELEASE_SECONDS)
            raise
        return keeper

    def _bring_up(self, holding: Holding, folder: RunFolder, lineage: Lineage, say: Callable[[str], None]) -> None:
        """Restore the folder if the mirror is ahead, before the mirror may follow the folder."""
        head = holding.head
        here = head.writer == lineage.folder and head.generation <= lineage.generation and folder.job_file.exists()
        trials = count_mirrored(self._store, head) if here else head.trials
        damage = _damage(folder, trials or 0, say) if here and STUDY in head.files else None
        if head.files and damage is not None:
            restore(self._store, head, folder, say, damage)
        elif head.files and not here:
            restore(self._store, head, folder, say)
        write_record(folder.path / LINEAGE, Lineage(folder=lineage.folder, generation=head.generation))
        if head.writer != lineage.folder:
            holding.update(lambda _: ({"writer": lineage.folder}, ()))
        if trials != head.trials and head.files:
            holding.update(lambda _: ({"trials": trials}, ()))
        try:
            self._store.sweep(head.job_id, head.objects.keys() | {*head.previous})
        except DeliveryError as error:
            say(f"warning: cannot delete old files at {self.uri}: {error.line}")


def _damage(folder: RunFolder, mirrored: int, say: Callable[[str], None]) -> str | None:
    """Return what this study lacks of its mirror, trying its backup first, or None. Raises MachineError if in use."""
    try:
        if restored := restore_if_damaged(folder.study_file):
            say(f"warning: {restored}")
    except DamagedError as error:
        return str(error)
    trials = count_trials(folder.study_file)
    if trials is None:
        return "the local study is missing or damaged"
    if trials < mirrored:
        return f"the local study holds {trials} trials, the checkpoint {mirrored}"
    return None


def _lineage(folder: RunFolder) -> Lineage:
    try:
        return Lineage.model_validate_json((folder.path / LINEAGE).read_bytes())
    except (OSError, ValidationError):
        return Lineage(folder=uuid.uuid4().hex, generation=0)
