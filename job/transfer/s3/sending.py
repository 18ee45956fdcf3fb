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

from job.errors import DeliveryError
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
        damaged: Returns the error for a file that does not have its SHA-256.
    """

    records: ResumeFile
    known: S3Capabilities | None = None
    damaged: Callable[[Path], DeliveryError] = damaged
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
            raise self.damaged(source)
        if self.in_parts(entry.size):
            return self._send_large(source, name, entry, condition, arrived)
        data = source.read_bytes()
        if hashlib.sha256(data).hexdigest() != entry.sha256:
            raise self.damaged(source)
        wanted = self.put(name, data, condition)
        arrived(entry.size)
        return wanted, entry.size

    def _send_large(
        self,
        source: Path,
        name: str,
        entry: ManifestEntry,
        condition: Mapping[str, str],
        arrived: Callable[[int], None],
    ) -> tuple[Fingerprint, int]:
        begun, present = self._begin_or_continue(name, entry)
        parts, whole, there, sent = dict[int, Part](), hashlib.sha256(), 0, 0
        stop = threading.Event()

        def read() -> Iterator[tuple[int, bytes]]:
            with source.open("rb") as file:
                for number in range(1, -(-entry.size // begun.part_bytes) + 1):
                    data = file.read(begun.part_bytes)
                    whole.update(data)
                    yield number, data
                    del data  # before the next part is read

        def send(block: tuple[int, bytes]) -> tuple[Part, int, int]:
            """Return a part, its bytes and how many of them were sent now."""
            number, data = block
            if _is_there(present.get(number, {}), data, begun.algorithm):
                return Part(number, present[number]["ETag"], digest(begun.algorithm, data)), len(data), 0
            part = self.store.send(name, begun.upload_id, number, data, begun.algorithm, stop)
            return part, len(data), len(data)

        def count(done: tuple[Part, int, int]) -> None:
            nonlocal there, sent
            part, size, new = done
            parts[part.number], there, sent = part, there + size, sent + new
            arrived(there)

        arrived(0)
        in_threads(send, read(), self.store.options.parallel_parts, count, "s3-part", stop)
        if whole.hexdigest() != entry.sha256:
            self._abandon(name, begun)
            raise self.damaged(source)
        ordered = [parts[number] for number in sorted(parts)]
        wanted = Fingerprint.of(entry, begun.algorithm, [part.digest for part in ordered], begun.part_bytes)
        self._complete(name, begun, ordered, wanted, condition)
        self.records.forget(name)
        return wanted, sent

    def _begin_or_continue(self, name: str, entry: ManifestEntry) -> tuple[UploadState, dict[int, Mapping[str, Any]]]:
        """Return the upload and its parts: the one to continue or, without a suitable one, a new one."""
        algorithm = self.server.algorithm
        begun = self.records.state.uploads.get(name)
        if begun is not None:
            try:
                if (begun.sha256, begun.size, begun.algorithm) == (entry.sha256, entry.size, algorithm):
                    return begun, self.store.parts(name, begun.upload_id)
                self._abandon(name, begun)
            except RefusedError as error:
                if not error.missing:  # Ceph says NoSuchKey
                    raise
        part_bytes = self.store.options.part_bytes(entry.size)
        upload = self.store.begin(name, metadata_of(entry.sha256, part_bytes), algorithm)
        begun = UploadState(
            upload_id=upload, part_bytes=part_bytes, algorithm=algorithm, sha256=entry.sha256, size=entry.size
        )
        self.records.begin(name, begun)
        return begun, {}

    def _complete(
        self, name: str, begun: UploadState, parts: list[Part], wanted: Fingerprint, condition: Mapping[str, str]
    ) -> None:
        """Complete the object; after a lost response, check it. Raises DeliveryError if someone else has written it."""
        try:
            self.store.complete(name, begun.upload_id, parts, begun.algorithm, condition)
        except RefusedError as error:
            if not error.conflicting:
                raise
            # A server that has taken the parts for an earlier try knows no upload any more, and shows no object yet.
            seconds = _COMPLETION_SECONDS if error.missing else 1.0
            if self.store.difference(name, wanted, seconds) is None:
                return
            if not error.missing:
                self._abandon(name, begun)
            if error.status == 412:
                raise conflict(self.store.target, name) from error
            raise

    def _abandon(self, name: str, begun: UploadState) -> None:
        """Abort a started upload, whose parts would cost money."""
        if self.store.abort(name, begun.upload_id):
            self.records.forget(name)


def _is_there(part: Mapping[str, Any], data: bytes, algorithm: Algorithm) -> bool:
    if part.get("Size") != len(data):
        return False
    if algorithm == "sha256" and (theirs := part.get("ChecksumSHA256")):
        return bool(theirs == b64encode(digest("sha256", data)).decode())
    return md5_of(part["ETag"]) == digest("md5", data).hex()
