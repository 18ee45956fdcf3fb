"""Uploads of files, in one piece or in parts; the server's list of parts determines what is left to send."""

from __future__ import annotations

import hashlib
import threading
from base64 import b64encode
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from job.records import ManifestEntry
from job.transfer.s3.capabilities import S3Capabilities
from job.transfer.s3.client import S3Client
from job.transfer.s3.failures import RefusedError, conflict, damaged
from job.transfer.s3.objects import Fingerprint, Part, checksum_of, digest, md5_of, metadata_of
from job.transfer.s3.resume_state import ResumeFile, UploadState

# How long a server may take to make an object of its parts: S3 itself speaks of several minutes.
_COMPLETION_SECONDS = 300.0
# A thread that waits for the server when the upload ends is left behind after this time.
_LEAVE_SECONDS = 2.0


def put(store: S3Client, server: S3Capabilities, name: str, data: bytes, condition: Mapping[str, str]) -> Fingerprint:
    """Write an object under IfNoneMatch or IfMatch; return its fingerprint. Raises DeliveryError."""
    checksum = checksum_of(server.algorithm, [digest(server.algorithm, data)], 0)
    wanted = Fingerprint(len(data), hashlib.sha256(data).hexdigest(), 0, server.algorithm, checksum)
    try:
        store.put(name, data, server.algorithm, condition)
    except RefusedError as error:
        # A try whose answer got lost may have written it already.
        if not error.conflicting:
            raise
        if store.difference(name, wanted) is not None:
            raise conflict(store.target, name) from error
    return wanted


@dataclass
class LargeFile:
    """Upload of one file as one object, in parts.

    Attributes:
        condition: The completion's IfNoneMatch or IfMatch.
        progress: Receives arrived bytes.
        sent_bytes: Bytes that arrived, without those of an earlier upload that is continued.
    """

    store: S3Client
    server: S3Capabilities
    records: ResumeFile
    source: Path
    name: str
    entry: ManifestEntry
    condition: Mapping[str, str]
    progress: Callable[[int], None]
    sent_bytes: int = 0

    def deliver(self) -> Fingerprint:
        """Send missing parts, complete the object and return its fingerprint. Raises DeliveryError, keeping state."""
        if self.source.stat().st_size != self.entry.size:
            raise damaged(self.source)
        begun, present = self._begin_or_continue()
        parts = self._send_parts(begun, present)
        checksum = checksum_of(begun.algorithm, [part.digest for part in parts], begun.part_bytes)
        wanted = Fingerprint(begun.size, begun.sha256, begun.part_bytes, begun.algorithm, checksum)
        self._complete(begun, parts, wanted)
        self.records.forget(self.name)
        return wanted

    def _begin_or_continue(self) -> tuple[UploadState, dict[int, Mapping[str, Any]]]:
        """Return the upload and its parts: the one to continue or, without a suitable one, a new one."""
        sha256, size, algorithm = self.entry.sha256, self.entry.size, self.server.algorithm
        begun = self.records.state.uploads.get(self.name)
        if begun is not None:
            try:
                if (begun.sha256, begun.size, begun.algorithm) == (sha256, size, algorithm):
                    return begun, self.store.parts(self.name, begun.upload_id)
                self._abandon(begun)
            except RefusedError as error:
                if not error.missing:  # Ceph says NoSuchKey
                    raise
        part_bytes = self.store.options.part_bytes(size)
        upload = self.store.begin(self.name, metadata_of(sha256, part_bytes), algorithm)
        begun = UploadState(upload_id=upload, part_bytes=part_bytes, algorithm=algorithm, sha256=sha256, size=size)
        self.records.begin(self.name, begun)
        return begun, {}

    def _send_parts(self, begun: UploadState, present: Mapping[int, Mapping[str, Any]]) -> list[Part]:
        """Read the file once: hash it, and send missing parts. Raises DeliveryError if the file has changed."""
        parts: dict[int, Part] = {}
        whole, stop, most = hashlib.sha256(), threading.Event(), self.store.options.parallel_parts
        running: set[Future[int]] = set()

        def send(number: int, data: bytes) -> int:
            parts[number] = self.store.send(self.name, begun.upload_id, number, data, begun.algorithm, stop)
            return len(data)

        def settle(left: int) -> None:
            """Wait until no more than `left` parts are on their way."""
            while len(running) > left:
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    running.discard(future)
                    self.sent_bytes += future.result()
                    self.progress(future.result())

        try:
            with self.source.open("rb") as file:
                for number in range(1, -(-begun.size // begun.part_bytes) + 1):
                    settle(most - 1)
                    data = file.read(begun.part_bytes)
                    whole.update(data)
                    if self._is_there(present.get(number, {}), data, begun):
                        parts[number] = Part(number, present[number]["ETag"], digest(begun.algorithm, data))
                        self.progress(len(data))
                    else:
                        running.add(_in_thread(send, number, data))
                    del data  # before the next part is read
            settle(0)
        finally:
            stop.set()
            wait(running, _LEAVE_SECONDS)
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

    def _complete(self, begun: UploadState, parts: list[Part], wanted: Fingerprint) -> None:
        """Complete the object; after a lost response, check it. Raises DeliveryError if someone else has written it."""
        try:
            self.store.complete(self.name, begun.upload_id, parts, begun.algorithm, self.condition)
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


def _in_thread(send: Callable[[int, bytes], int], number: int, data: bytes) -> Future[int]:
    """Send a part in a thread that does not hold up the end of the process, as those of an executor do."""
    future: Future[int] = Future()

    def run() -> None:
        try:
            future.set_result(send(number, data))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name=f"s3-part-{number}", daemon=True).start()
    return future
