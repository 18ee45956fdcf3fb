"""Uploads of files, in one piece or in parts; the server's list of parts determines what is left to send."""

from __future__ import annotations

import hashlib
import threading
from base64 import b64encode
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from job.records import ManifestEntry
from job.system.threads import in_threads
from job.transfer.s3.capabilities import S3Capabilities, detect
from job.transfer.s3.client import S3Client
from job.transfer.s3.failures import RefusedError, conflict, damaged
from job.transfer.s3.objects import Algorithm, Fingerprint, Part, digest, md5_of, metadata_of
from job.transfer.s3.resume_state import ResumeFile, UploadState

# How long a server may take to make an object of its parts: S3 itself speaks of several minutes.
_COMPLETION_SECONDS = 300.0


@dataclass
class Sender:
    """Writes objects to a bucket, and continues uploads that an earlier call has begun.

    Attributes:
        store: The bucket, set before anything is sent; another one of the same target may replace it.
        known: What an earlier probe has found; None: the server is probed when its capabilities are first needed.
    """

    records: ResumeFile
    known: S3Capabilities | None = None
    store: S3Client = field(init=False)

    @cached_property
    def server(self) -> S3Capabilities:
        """The server's capabilities. Raises DeliveryError."""
        return self.known or detect(self.store)

    def put(self, name: str, data: bytes, condition: Mapping[str, str]) -> Fingerprint:
        """Write an object under IfNoneMatch or IfMatch; return its fingerprint. Raises DeliveryError."""
        algorithm = self.server.algorithm
        entry = ManifestEntry(sha256=hashlib.sha256(data).hexdigest(), size=len(data))
        wanted = Fingerprint.of(entry, algorithm, [digest(algorithm, data)])
        try:
            self.store.put(name, data, algorithm, condition)
        except RefusedError as error:
            # A try whose answer got lost may have written it already.
            if not error.conflicting:
                raise
            if self.store.difference(name, wanted) is not None:
                raise conflict(self.store.target, name) from error
        return wanted

    def in_parts(self, size: int) -> bool:
        """Return whether a file of this size is sent in parts."""
        return size > self.store.options.part_bytes(size)

    def send(
        self,
        source: Path,
        name: str,
        entry: ManifestEntry,
        condition: Mapping[str, str],
        arrived: Callable[[int], None],
    ) -> tuple[Fingerprint, int]:
        """Send a file, or what is missing of it; return its fingerprint and the bytes sent.

        `condition` is the object's IfNoneMatch or IfMatch; `arrived` receives how many of its bytes are there. Raises
        DeliveryError, keeping the record of the upload.
        """
        if source.stat().st_size != entry.size:
            raise damaged(source)
        if self.in_parts(entry.size):
            large = _LargeFile(self.store, self.server.algorithm, self.records, source, name, entry, arrived)
            return large.deliver(condition), large.sent_bytes
        data = source.read_bytes()
        if hashlib.sha256(data).hexdigest() != entry.sha256:
            raise damaged(source)
        wanted = self.put(name, data, condition)
        arrived(entry.size)
        return wanted, entry.size


@dataclass
class _LargeFile:
    """Upload of one file as one object, in parts.

    Attributes:
        there_bytes: Bytes that arrived, with those of an earlier upload that is continued.
        sent_bytes: Bytes that arrived, without those.
    """

    store: S3Client
    algorithm: Algorithm
    records: ResumeFile
    source: Path
    name: str
    entry: ManifestEntry
    arrived: Callable[[int], None]
    there_bytes: int = 0
    sent_bytes: int = 0

    def deliver(self, condition: Mapping[str, str]) -> Fingerprint:
        """Send missing parts, complete the object and return its fingerprint. Raises DeliveryError, keeping state."""
        begun, present = self._begin_or_continue()
        parts = self._send_parts(begun, present)
        wanted = Fingerprint.of(self.entry, begun.algorithm, [part.digest for part in parts], begun.part_bytes)
        self._complete(begun, parts, wanted, condition)
        self.records.forget(self.name)
        return wanted

    def _begin_or_continue(self) -> tuple[UploadState, dict[int, Mapping[str, Any]]]:
        """Return the upload and its parts: the one to continue or, without a suitable one, a new one."""
        sha256, size = self.entry.sha256, self.entry.size
        begun = self.records.state.uploads.get(self.name)
        if begun is not None:
            try:
                if (begun.sha256, begun.size, begun.algorithm) == (sha256, size, self.algorithm):
                    return begun, self.store.parts(self.name, begun.upload_id)
                self._abandon(begun)
            except RefusedError as error:
                if not error.missing:  # Ceph says NoSuchKey
                    raise
        part_bytes = self.store.options.part_bytes(size)
        upload = self.store.begin(self.name, metadata_of(sha256, part_bytes), self.algorithm)
        begun = UploadState(upload_id=upload, part_bytes=part_bytes, algorithm=self.algorithm, sha256=sha256, size=size)
        self.records.begin(self.name, begun)
        return begun, {}

    def _send_parts(self, begun: UploadState, present: Mapping[int, Mapping[str, Any]]) -> list[Part]:
        """Read the file once: hash it, and send missing parts. Raises DeliveryError if the file has changed."""
        parts: dict[int, Part] = {}
        whole, stop = hashlib.sha256(), threading.Event()

        def read() -> Iterator[tuple[int, bytes]]:
            with self.source.open("rb") as file:
                for number in range(1, -(-begun.size // begun.part_bytes) + 1):
                    data = file.read(begun.part_bytes)
                    whole.update(data)
                    yield number, data
                    del data  # before the next part is read

        def send(block: tuple[int, bytes]) -> tuple[Part, int, int]:
            """Return a part, its bytes and how many of them were sent now."""
            number, data = block
            if self._is_there(present.get(number, {}), data, begun):
                return Part(number, present[number]["ETag"], digest(begun.algorithm, data)), len(data), 0
            return (
                self.store.send(self.name, begun.upload_id, number, data, begun.algorithm, stop),
                len(data),
                len(data),
            )

        def count(done: tuple[Part, int, int]) -> None:
            part, size, sent = done
            parts[part.number] = part
            self.there_bytes, self.sent_bytes = self.there_bytes + size, self.sent_bytes + sent
            self.arrived(self.there_bytes)

        self.arrived(0)
        in_threads(send, read(), self.store.options.parallel_parts, count, "s3-part", stop)
        if whole.hexdigest() != begun.sha256:
            self._abandon(begun)
            raise damaged(self.source)
        return [parts[number] for number in sorted(parts)]

    def _is_there(self, part: Mapping[str, Any], data: bytes, begun: UploadState) -> bool:
        if part.get("Size") != len(data):
            return False
        if begun.algorithm == "sha256" and (theirs := part.get("ChecksumSHA256")):
            return bool(theirs == b64encode(digest("sha256", data)).decode())
        return md5_of(part["ETag"]) == digest("md5", data).hex()

    def _complete(
        self, begun: UploadState, parts: list[Part], wanted: Fingerprint, condition: Mapping[str, str]
    ) -> None:
        """Complete the object; after a lost response, check it. Raises DeliveryError if someone else has written it."""
        try:
            self.store.complete(self.name, begun.upload_id, parts, begun.algorithm, condition)
        except RefusedError as error:
            if not error.conflicting:
                raise
            # A server that has taken the parts for an earlier try knows no upload any more, and shows no object yet.
            seconds = _COMPLETION_SECONDS if error.missing else 1.0
            if self.store.difference(self.name, wanted, seconds) is None:
                return
            if not error.missing:
                self._abandon(begun)
            if error.status == 412:
                raise conflict(self.store.target, self.name) from error
            raise

    def _abandon(self, begun: UploadState) -> None:
        """Abort a started upload, whose parts would cost money."""
        if self.store.abort(self.name, begun.upload_id):
            self.records.forget(self.name)
