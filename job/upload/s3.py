"""Resumable, verified delivery to an S3 bucket; the manifest comes last and marks completion."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

from pydantic import ValidationError

from job.errors import DeliveryError
from job.records import Manifest, ManifestEntry, Record
from job.storage.atomic import read_record
from job.storage.exports import MANIFEST
from job.transfer.s3.abandoned import abort_listed, abort_noted
from job.transfer.s3.capabilities import S3Capabilities, detect
from job.transfer.s3.client import S3Client
from job.transfer.s3.failures import RefusedError, damaged
from job.transfer.s3.multipart import LargeFile
from job.transfer.s3.objects import (
    Algorithm,
    Fingerprint,
    RemoteObject,
    described,
    difference,
    fingerprint,
    lasting_difference,
    look_up,
)
from job.transfer.s3.options import S3Options, S3Target
from job.transfer.s3.resume_state import TouchedNames, UploadStates
from job.transfer.s3.small import put

_LOOKS = 3


class Delivery(Record):
    """Result of a delivery.

    Attributes:
        sent_bytes: Bytes of arrived files.
        resumed_bytes: Bytes sent by an earlier run, of uploads completed now.
        notes: Missing capabilities of the server, for people.
    """

    sent: int = 0
    skipped: int = 0
    sent_bytes: int = 0
    resumed_bytes: int = 0
    removed: int = 0
    aborted: int = 0
    notes: tuple[str, ...] = ()


def deliver(
    export: Path,
    uri: str,
    state: Path,
    options: S3Options | None = None,
    *,
    progress: Callable[[int], None] = lambda _size: None,
    capabilities: S3Capabilities | None = None,
) -> Delivery:
    """Bring an export under s3://bucket/prefix, and its manifest last; a second call continues a broken one.

    Args:
        export: Folder of the export with its manifest.json.
        uri: The target.
        state: Folder in which begun uploads are noted, made if needed; any number of targets may share it.
        options: How to reach the server and how to send.
        progress: Told of bytes that are there, one call at a time but from any thread; together they make the
            size of all files but the manifest. A negative number takes back what has to be sent again.
        capabilities: What `probe` has found; found out when needed otherwise.

    Returns:
        What was done.

    Raises:
        DeliveryError: The target failed for good; state and export are kept and a second call continues.
        UsageError: The target is no S3 target, or the endpoint no URL or one with the bucket.
        JobError: The export has no manifest.
    """
    manifest_bytes = (export / MANIFEST).read_bytes() if (export / MANIFEST).is_file() else b""
    manifest = read_record(export / MANIFEST, Manifest)
    options = options or S3Options()
    with S3Client(S3Target.parse(uri), options) as store:
        run = _Run(store, export, manifest, manifest_bytes, state, progress, capabilities)
        return run.deliver()


class _Run:
    def __init__(
        self,
        store: S3Client,
        export: Path,
        manifest: Manifest,
        manifest_bytes: bytes,
        state: Path,
        progress: Callable[[int], None],
        capabilities: S3Capabilities | None,
    ) -> None:
        self._store, self._export, self._manifest, self._manifest_bytes = store, export, manifest, manifest_bytes
        self._progress = progress
        self._given = capabilities
        self._states = UploadStates(state, store.options.endpoint, store.target.bucket)
        self._touched = TouchedNames(state, store.options.endpoint, str(store.target))
        self._fingerprints: dict[str, Fingerprint] = {}
        self._done = Delivery()

    @cached_property
    def _server(self) -> S3Capabilities:
        return self._given or detect(self._store)

    def deliver(self) -> Delivery:
        marker, marked = self._marker()
        remote = self._survey()
        missing = [name for name in self._manifest.files if name not in self._fingerprints]
        self._add(skipped=len(self._fingerprints))
        for name in self._fingerprints:
            self._progress(self._manifest.files[name].size)
        listed = set(marked.files) if marked is not None else set()
        former = (self._touched.names() | listed) - {*self._manifest.files, MANIFEST}
        if missing or former or marker != self._manifest_bytes:
            self._touched.add({*listed, *self._manifest.files})
        if marker is not None and (missing or former or marker != self._manifest_bytes):
            # Nobody may take a mixture for a delivery: no marker stands there while files change.
            self._store.call("delete_object", Key=self._key(MANIFEST))
            marker = None
        self._add(aborted=abort_noted(self._store, self._states, keep={self._key(name) for name in missing}))
        self._abort_abandoned(missing)
        for name in missing:
            self._fingerprints[name] = self._send(name, self._manifest.files[name], remote[name])
        # Again: the id of an upload that was begun just now may have got lost on the line.
        self._abort_abandoned(missing)
        self._remove(former)
        self._verify()
        if marker is None:
            self._mark()
        self._touched.clear()
        return self._done.model_copy(update={"notes": self._server.quirks if self._done.sent else ()})

    def _key(self, name: str) -> str:
        return self._store.target.key(name)

    def _add(self, **counts: int) -> None:
        values = {name: getattr(self._done, name) + count for name, count in counts.items()}
        self._done = self._done.model_copy(update=values)

    def _marker(self) -> tuple[bytes | None, Manifest | None]:
        """Return the present delivery's manifest, as bytes and parsed. Raises DeliveryError if it is not ours."""
        for look in range(_LOOKS):
            if look:
                self._store.pause(look)
            try:
                data, answer = self._store.read(self._key(MANIFEST))
            except RefusedError as error:
                if error.status == 404 and error.code != "NoSuchBucket":
                    return None, None
                raise
            # A torn answer lacks our mark or the end.
            if described(answer).sha256 == hashlib.sha256(data).hexdigest():
                try:
                    return data, Manifest.model_validate_json(data)
                except ValidationError:
                    break
        raise self._foreign([MANIFEST])

    def _foreign(self, names: list[str]) -> DeliveryError:
        shown = ", ".join(names[:3]) + (" ..." if len(names) > 3 else "")
        return DeliveryError(
            f"{self._store.target} holds objects of something else under names of this delivery: {shown}",
            remedy="choose another prefix or move them away",
        )

    def _survey(self) -> dict[str, RemoteObject | None]:
        """Look up this delivery's objects, and record correct ones. Raises DeliveryError for foreign ones."""
        remote = {name: look_up(self._store, self._key(name)) for name in self._manifest.files}
        if foreign := [name for name, there in remote.items() if there is not None and there.sha256 is None]:
            raise self._foreign(foreign)
        for name, entry in self._manifest.files.items():
            there = remote[name]
            if there is not None and (there.sha256, there.size) == (entry.sha256, entry.size):
                algorithm: Algorithm = "md5" if there.checksum is None else "sha256"
                wanted = fingerprint(self._export / name, there.part_bytes, algorithm)
                if wanted.sha256 != entry.sha256:
                    raise damaged(self._export / name)
                # The server's kind of ETag matters only without a checksum.
                md5_etags = algorithm == "md5" and self._server.has_md5_etag(there.part_bytes)
                if difference(there, wanted, md5_etags=md5_etags) is None:
                    self._fingerprints[name] = wanted
        return remote

    def _send(self, name: str, entry: ManifestEntry, there: RemoteObject | None) -> Fingerprint:
        source = self._export / name
        if entry.size <= self._store.options.part_bytes(entry.size):
            data = source.read_bytes() if source.stat().st_size == entry.size else b""
            if hashlib.sha256(data).hexdigest() != entry.sha256:
                raise damaged(source)
            sent = put(self._store, self._server, self._key(name), data, self._conditions(there))
            self._progress(entry.size)
            self._add(sent=1, sent_bytes=entry.size)
            return sent
        if not self._server.multipart:
            raise DeliveryError(
                f"{self._store.target}: the server takes no files of more than a part ({name})",
                remedy="use another S3 server",
            )
        large = LargeFile(
            self._store,
            self._states,
            source,
            self._key(name),
            entry,
            server=self._server,
            conditions=self._conditions(there) if self._server.conditional_complete else {},
            progress=self._progress,
        )
        sent = large.deliver()
        self._add(sent=1, sent_bytes=large.sent_bytes, resumed_bytes=large.resumed_bytes)
        return sent

    def _conditions(self, there: RemoteObject | None) -> dict[str, str]:
        """Return the condition of a write: no object, or the observed one."""
        if there is None:
            return {"IfNoneMatch": "*"} if self._server.conditional else {}
        return {"IfMatch": there.etag} if self._server.conditional_replace else {}

    def _abort_abandoned(self, sent: list[str]) -> None:
        """Abort abandoned uploads under our keys."""
        if sent and self._server.lists_uploads:
            keys = {self._key(name) for name in self._manifest.files}
            self._add(aborted=abort_listed(self._store, self._states, keys))

    def _remove(self, former: set[str]) -> None:
        """Delete objects of replaced deliveries; foreign ones are kept."""
        for name in sorted(former):
            there = look_up(self._store, self._key(name))
            if there is not None and there.sha256 is not None:
                self._store.call("delete_object", Key=self._key(name))
                self._add(removed=1)

    def _verify(self) -> None:
        """Compare every object with its file. Raises DeliveryError if one differs."""
        for name, wanted in self._fingerprints.items():
            self._check(name, wanted)

    def _check(self, name: str, wanted: Fingerprint) -> None:
        md5_etags = wanted.algorithm == "md5" and self._server.has_md5_etag(wanted.part_bytes)
        reason = lasting_difference(self._store, self._key(name), wanted, md5_etags=md5_etags)
        if reason is not None:
            raise DeliveryError(
                f"{self._store.target}: {name} is not what was sent: {reason}",
                remedy="run again: it is sent anew; if that fails, too, use another S3 server",
            )

    def _mark(self) -> None:
        """Write the marker where there is none, and check it."""
        key, conditions = self._key(MANIFEST), self._conditions(None)
        self._check(MANIFEST, put(self._store, self._server, key, self._manifest_bytes, conditions))
        self._add(sent=1)
