"""Resumable multipart uploads: the server's list of parts determines what is left to send."""

from __future__ import annotations

import hashlib
import threading
from base64 import b64encode
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from job.records import ManifestEntry
from job.transfer.s3.abandoned import abort
from job.transfer.s3.capabilities import S3Capabilities
from job.transfer.s3.client import Body, S3Client
from job.transfer.s3.failures import RefusedError, conflict, damaged
from job.transfer.s3.objects import (
    Algorithm,
    Fingerprint,
    checked,
    checksum_of,
    comparable_etag,
    digest,
    lasting_difference,
    object_metadata,
)
from job.transfer.s3.part_pool import Lanes
from job.transfer.s3.resume_state import UploadState, UploadStates

# How often an upload that the server has lost, or would not complete, is made again.
_RESTARTS = 3
# How long a server may take to make an object of its parts: S3 itself speaks of several minutes.
_COMPLETION_SECONDS = 300.0
_AGAIN = frozenset({"NoSuchUpload", "ConditionalRequestConflict", "InvalidPart"})


class LargeFile:
    """Upload of one file as one object, in parts."""

    def __init__(
        self,
        store: S3Client,
        states: UploadStates,
        source: Path,
        key: str,
        entry: ManifestEntry,
        *,
        server: S3Capabilities,
        conditions: Mapping[str, str],
        progress: Callable[[int], None],
    ) -> None:
        """Describe the upload.

        `conditions` are the completion's IfNoneMatch or IfMatch. `progress` gets arrived bytes, one call at a time from
        any thread, negative for bytes to resend.
        """
        self._store, self._states, self._source, self._key, self._entry = store, states, source, key, entry
        self._server, self._algorithm = server, server.algorithm
        self._conditions = dict(conditions)
        self._progress = progress
        self._told = 0
        self._lock = threading.Lock()
        self.resumed_bytes = 0
        self.sent_bytes = 0

    def deliver(self) -> Fingerprint:
        """Send missing parts, complete the object and return its fingerprint. Raises DeliveryError, keeping state."""
        for restart in range(_RESTARTS + 1):
            try:
                return self._attempt()
            except RefusedError as error:
                if not error.status:
                    self._ask_why()
                if error.code not in _AGAIN or restart == _RESTARTS:
                    raise
                if error.code == "ConditionalRequestConflict":
                    self._abandon()
                elif error.code == "NoSuchUpload":
                    self._states.forget(self._key)
                self._progress(-self._told)
                self._told = self.resumed_bytes = 0
        raise AssertionError("unreachable")

    def _ask_why(self) -> None:
        """Raise RefusedError if a request without body is refused too: servers may refuse a part by hanging up."""
        with S3Client(self._store.target, replace(self._store.options, attempts=1)) as store:
            try:
                answer = store.call("create_multipart_upload", Key=self._key, **store.encryption)
            except RefusedError as error:
                if error.status and not error.transient:
                    raise
                return
            abort(store, self._key, answer["UploadId"])

    def _attempt(self) -> Fingerprint:
        if self._source.stat().st_size != self._entry.size:
            raise damaged(self._source)
        state, present = self._begun() or (self._begin(), {})
        etags, digests = self._send_parts(state, present)
        checksum = checksum_of(state.algorithm, digests, state.part_bytes)
        wanted = Fingerprint(self._entry.size, self._entry.sha256, state.part_bytes, state.algorithm, checksum)
        self._complete(state, etags, digests, wanted)
        self._states.forget(self._key)
        return wanted

    def _begun(self) -> tuple[UploadState, dict[int, Mapping[str, Any]]] | None:
        """Return the upload to resume and its parts; an unsuitable one is aborted."""
        state = self._states.load(self._key)
        if state is None:
            return None
        if (state.sha256, state.size) != (self._entry.sha256, self._entry.size):
            self._abandon()
            return None
        try:
            return state, self._listed(state)
        except RefusedError as error:
            # Ceph says NoSuchKey.
            if error.status != 404 or error.code == "NoSuchBucket":
                raise
            self._states.forget(self._key)
            return None

    def _listed(self, state: UploadState) -> dict[int, Mapping[str, Any]]:
        parts: dict[int, Mapping[str, Any]] = {}
        marker: dict[str, int] = {}
        while True:
            answer = self._store.call("list_parts", Key=self._key, UploadId=state.upload_id, **marker)
            page = {part["PartNumber"]: part for part in answer.get("Parts", [])}
            if not answer.get("IsTruncated") or page.keys() <= parts.keys():
                return parts | page
            parts |= page
            marker = {"PartNumberMarker": max(page)}

    def _begin(self) -> UploadState:
        part_bytes = self._store.options.part_bytes(self._entry.size)
        kept = {"ChecksumAlgorithm": "SHA256", "ChecksumType": "COMPOSITE"} if self._algorithm == "sha256" else {}
        answer = self._store.call(
            "create_multipart_upload",
            Key=self._key,
            Metadata=object_metadata(self._entry.sha256, part_bytes),
            **kept,
            **self._store.encryption,
        )
        state = UploadState(
            bucket=self._store.target.bucket,
            key=self._key,
            upload_id=answer["UploadId"],
            part_bytes=part_bytes,
            algorithm=self._algorithm,
            sha256=self._entry.sha256,
            size=self._entry.size,
        )
        self._states.save(state)
        return state

    def _send_parts(
        self, state: UploadState, present: Mapping[int, Mapping[str, Any]]
    ) -> tuple[dict[int, str], dict[int, bytes]]:
        """Read the file once: hash it, and send each missing part. Raises DeliveryError if it has changed."""
        etags: dict[int, str] = {}
        digests: dict[int, bytes] = {}
        whole = hashlib.sha256()

        def send(number: int, data: memoryview) -> None:
            digests[number] = digest(state.algorithm, data)
            etags[number] = self._send_part(state, number, data, digests[number], lanes.stop)
            self._count(len(data))

        lanes = Lanes(self._store.options.parallel_parts, min(state.part_bytes, state.size), send)
        with self._source.open("rb", buffering=0) as file, lanes:
            for number, start in enumerate(range(0, state.size, state.part_bytes), 1):
                buffer = lanes.buffer()
                data = memoryview(buffer)[: min(state.part_bytes, state.size - start)]
                _fill(file, data)
                whole.update(data)
                if number in present and self._is_there(present[number], data, state.algorithm):
                    digests[number], etags[number] = digest(state.algorithm, data), present[number]["ETag"]
                    self._count(len(data), resumed=True)
                    lanes.give_back(buffer)
                else:
                    lanes.send(number, buffer, len(data))
            lanes.finish()
        if whole.hexdigest() != state.sha256:
            self._abandon()
            raise damaged(self._source)
        return etags, digests

    def _is_there(self, part: Mapping[str, Any], data: memoryview, algorithm: Algorithm) -> bool:
        """Return whether a listed part equals the one to send."""
        if part["Size"] != len(data):
            return False
        if algorithm == "sha256" and (theirs := part.get("ChecksumSHA256")):
            return bool(theirs == b64encode(digest("sha256", data)).decode())
        md5_etags = self._server.md5_etags and self._store.options.sse != "aws:kms"
        etag = comparable_etag(part["ETag"]) if md5_etags else None
        return etag in (None, digest("md5", data).hex())

    def _send_part(
        self, state: UploadState, number: int, data: memoryview, checksum: bytes, stop: threading.Event
    ) -> str:
        answer = self._store.call(
            "upload_part",
            Key=self._key,
            UploadId=state.upload_id,
            PartNumber=number,
            Body=Body(data, stop),
            **checked(state.algorithm, checksum),
        )
        return str(answer["ETag"])

    def _count(self, size: int, *, resumed: bool = False) -> None:
        with self._lock:
            self._told += size
            if resumed:
                self.resumed_bytes += size
            else:
                self.sent_bytes += size
            self._progress(size)

    def _complete(
        self, state: UploadState, etags: Mapping[int, str], digests: Mapping[int, bytes], wanted: Fingerprint
    ) -> None:
        """Complete the object; after a lost response, check it. Raises DeliveryError if someone else has written it."""
        parts = []
        for number in sorted(etags):
            part: dict[str, Any] = {"PartNumber": number, "ETag": etags[number]}
            if state.algorithm == "sha256":
                part["ChecksumSHA256"] = b64encode(digests[number]).decode()
            parts.append(part)
        try:
            self._store.call(
                "complete_multipart_upload",
                Key=self._key,
                UploadId=state.upload_id,
                MultipartUpload={"Parts": parts},
                **self._conditions,
            )
        except RefusedError as error:
            if error.status not in (404, 409, 412):
                raise
            # A server that has taken the parts for an earlier try knows no upload any more, and shows no object yet.
            seconds = _COMPLETION_SECONDS if error.status == 404 and error.repeated else 0.0
            md5_etags = self._server.md5_part_etags
            if lasting_difference(self._store, self._key, wanted, md5_etags=md5_etags, seconds=seconds) is None:
                return
            if error.status != 412:
                raise
            self._abandon()
            raise conflict(self._store.target, self._key) from error

    def _abandon(self) -> None:
        """Abort the started upload, whose parts would cost money."""
        state = self._states.load(self._key)
        if state is not None and abort(self._store, state.key, state.upload_id):
            self._states.forget(self._key)


def _fill(file: Any, data: memoryview) -> None:
    """Fill data from an unbuffered file; a short file leaves the rest unchanged, and fails the hash."""
    done = 0
    while done < len(data):
        read = file.readinto(data[done:])
        if not read:
            break
        done += read
