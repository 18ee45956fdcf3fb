"""Resumable, verified delivery to an S3 bucket; the manifest comes last and marks completion."""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Callable, Set
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from pydantic import ValidationError

from job.errors import DeliveryError
from job.records import Manifest, ManifestEntry
from job.storage.atomic import read_record
from job.storage.exports import MANIFEST
from job.system.retry import backoff_s, retried
from job.transfer.s3.capabilities import S3Capabilities
from job.transfer.s3.client import S3Client
from job.transfer.s3.failures import RefusedError, damaged
from job.transfer.s3.objects import Fingerprint, RemoteObject, described, fingerprint
from job.transfer.s3.options import S3Options, S3Target
from job.transfer.s3.resume_state import ResumeFile
from job.transfer.s3.sending import Sender

_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.5, 60.0
# Several tries fit into the patience, however short it is.
_WAIT_SHARE = 0.1


@dataclass
class Delivery:
    """Result of a delivery.

    Attributes:
        sent_bytes: Bytes of arrived files.
        resumed_bytes: Bytes that an earlier try had sent, of uploads completed now.
    """

    sent: int = 0
    skipped: int = 0
    sent_bytes: int = 0
    resumed_bytes: int = 0
    removed: int = 0
    aborted: int = 0


def deliver(
    export: Path,
    uri: str,
    state: Path,
    options: S3Options | None = None,
    *,
    progress: Callable[[int], None] = lambda _size: None,
    capabilities: S3Capabilities | None = None,
) -> Delivery:
    """Upload an export under s3://bucket/prefix, its manifest last; a second call continues a broken one.

    A failure of the line or the server is waited out, unless nothing arrives for `options.patience_s`.

    Args:
        export: Folder of the export with its manifest.json.
        uri: The target.
        state: Folder for records of started uploads, created if needed; targets may share it.
        options: How to reach the server and how to send.
        progress: Receives arrived bytes, in total the size of all files but the manifest. A negative number takes back
            what has to be sent again.
        capabilities: What `probe` has found; None: found out when needed.

    Raises:
        DeliveryError: The target failed for good; state and export are kept and a second call continues.
        UsageError: The target is no S3 target, or the endpoint no URL or one with the bucket.
        JobError: The export has no manifest.
    """
    run = _Run(export, S3Target.parse(uri), state, options or S3Options(), progress, capabilities)
    return retried(run.deliver, run.wait_after)


class _Run:
    """One delivery, which every call of `deliver` continues."""

    def __init__(
        self,
        export: Path,
        target: S3Target,
        state: Path,
        options: S3Options,
        progress: Callable[[int], None],
        capabilities: S3Capabilities | None,
    ) -> None:
        self._export, self._target, self._options, self._progress = export, target, options, progress
        self._manifest = read_record(export / MANIFEST, Manifest)
        self._manifest_bytes = (export / MANIFEST).read_bytes()
        place = hashlib.sha256(f"{options.endpoint}\n{target}".encode()).hexdigest()
        self._records = ResumeFile(state / f"s3-{place[:24]}.json")
        self._sender = Sender(self._records, capabilities)
        self._fingerprints: dict[str, Fingerprint] = {}
        self._done = Delivery()
        self._begun: set[str] = set()  # names of files that are sent in parts
        self._arrived: Counter[str] = Counter()  # bytes by name
        self._most = self._failures = 0
        self._until = 0.0

    @property
    def _store(self) -> S3Client:
        return self._sender.store

    def deliver(self) -> Delivery:
        """Continue with a new client, whose budget of retries is full."""
        with closing(S3Client(self._target, self._options)) as self._sender.store:
            self._deliver()
        return self._done

    def wait_after(self, error: Exception, _: int) -> float | None:
        """Return the seconds to wait after a failure, None to give up."""
        if not isinstance(error, RefusedError) or not error.transient:
            return None
        if not self._failures:
            self._until = time.monotonic() + self._options.patience_s
        self._failures += 1
        give_up = time.monotonic() >= self._until
        longest_s = min(_LONGEST_WAIT_S, _WAIT_SHARE * self._options.patience_s)
        return None if give_up else backoff_s(self._failures, _FIRST_WAIT_S, longest_s)

    def _deliver(self) -> None:
        files = self._manifest.files
        marker, listed = self._marker()
        remote = self._survey()
        missing = [name for name in files if name not in self._fingerprints]
        former = (self._records.state.touched | listed) - {*files, MANIFEST}
        is_marked = marker == self._manifest_bytes and not missing and not former
        if not is_marked:
            self._records.change(touched=self._records.state.touched.union(listed, files))
            if marker is not None:
                # A mixture must not look like a delivery: no marker stands there while files change.
                self._store.delete(MANIFEST)
        for name in missing:
            self._fingerprints[name] = self._send(name, files[name], remote[name])
        self._abort_abandoned()
        self._remove(former)
        for name, wanted in self._fingerprints.items():
            self._check(name, wanted)
        if not is_marked:
            self._check(MANIFEST, self._sender.put(MANIFEST, self._manifest_bytes, self._condition(None)))
            self._done.sent += 1
        self._records.clear()

    def _arrive(self, name: str, size: int) -> None:
        """Record how many bytes of a file are there; fewer than before: they have to be sent again."""
        change, self._arrived[name] = size - self._arrived[name], size
        if self._arrived.total() > self._most:
            self._most, self._failures = self._arrived.total(), 0
        if change:
            self._progress(change)

    def _marker(self) -> tuple[bytes | None, Set[str]]:
        """Return the present delivery's manifest and the names in it. Raises DeliveryError if it is not ours."""
        if (found := self._store.read(MANIFEST)) is None:
            return None, set()
        data, answer = found
        try:
            if described(answer).sha256 is not None:
                return data, Manifest.model_validate_json(data).files.keys()
        except ValidationError:
            pass
        raise self._foreign([MANIFEST])

    def _foreign(self, names: list[str]) -> DeliveryError:
        shown = ", ".join(names[:3]) + (" ..." if len(names) > 3 else "")
        return DeliveryError(
            f"{self._store.target} holds objects of something else under names of this delivery: {shown}",
            remedy="choose another prefix or move them away",
        )

    def _survey(self) -> dict[str, RemoteObject | None]:
        """Look up missing objects, and record correct ones. Raises DeliveryError for foreign ones."""
        names = [name for name in self._manifest.files if name not in self._fingerprints]
        remote = {name: self._store.look_up(name) for name in names}
        if foreign := [name for name, there in remote.items() if there is not None and there.sha256 is None]:
            raise self._foreign(foreign)
        for name, there in remote.items():
            entry = self._manifest.files[name]
            if there is None or (there.sha256, there.size) != (entry.sha256, entry.size):
                continue
            wanted = fingerprint(self._export / name, there.part_bytes, "sha256" if there.checksum else "md5")
            if wanted.sha256 != entry.sha256:
                raise damaged(self._export / name)
            if wanted.difference(there) is None:
                self._fingerprints[name] = wanted
                self._arrive(name, entry.size)
                self._done.skipped += 1
        return remote

    def _send(self, name: str, entry: ManifestEntry, there: RemoteObject | None) -> Fingerprint:
        in_parts = self._sender.in_parts(entry.size)
        if in_parts:
            self._begun.add(name)
        condition = self._condition(there, in_parts=in_parts)
        wanted, sent = self._sender.send(self._export / name, name, entry, condition, partial(self._arrive, name))
        self._done.sent += 1
        self._done.sent_bytes += sent
        self._done.resumed_bytes += entry.size - sent
        return wanted

    def _condition(self, there: RemoteObject | None, *, in_parts: bool = False) -> dict[str, str]:
        """Return the condition of a write: no object, or the observed one; none if the server ignores it."""
        server = self._sender.server
        if not server.conditional or (in_parts and not server.conditional_complete):
            return {}
        return {"IfNoneMatch": "*"} if there is None else {"IfMatch": there.etag}

    def _abort_abandoned(self) -> None:
        """Abort recorded uploads that were not continued, and unrecorded ones of the files sent in parts."""
        for name, upload in self._records.state.uploads.items():
            if self._store.abort(name, upload.upload_id):
                self._records.forget(name)
                self._done.aborted += 1
        for name in self._begun:
            self._done.aborted += self._store.abort_listed(name)

    def _remove(self, former: Set[str]) -> None:
        for name in sorted(former):
            there = self._store.look_up(name)
            if there is not None and there.sha256 is not None:
                self._store.delete(name)
                self._done.removed += 1

    def _check(self, name: str, wanted: Fingerprint) -> None:
        reason = self._store.difference(name, wanted)
        if reason is not None:
            raise DeliveryError(
                f"{self._store.target}: {name} is not what was sent: {reason}",
                remedy="run again: it is sent anew; if that fails, too, use another S3 server",
            )
