"""Mirrors in an S3 bucket; heads are replaced by conditional PUT."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from collections.abc import Set as AbstractSet
from datetime import datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

from job.mirror.options import SnapshotPace
from job.mirror.records import HEAD, MOST_HEAD_BYTES, OBJECTS, MirroredFile, oversized_head
from job.mirror.store import ConflictError, OversizedError, Proof, Stored, changed
from job.records import ManifestEntry
from job.transfer.s3.client import S3Client as Bucket
from job.transfer.s3.failures import RefusedError, TooLargeError
from job.transfer.s3.options import MIB, S3Options, S3Target
from job.transfer.s3.resume_state import ResumeFile
from job.transfer.s3.sending import Sender

# Mirrors are written repeatedly: failing soon is better than waiting long for one request.
_READ_TIMEOUT_S = 20.0
_FETCHED = 16 * MIB
# Without conditional requests: time for another's write to become visible.
_SETTLE_S = 1.0


class S3Store:
    """Keeps jobs' mirrors under s3://bucket/prefix; replaces heads by conditional requests if the server has them."""

    def __init__(self, uri: str, options: S3Options | None = None, pace: SnapshotPace | None = None) -> None:
        """Make a client. Raises DeliveryError for bad credentials, UsageError for an endpoint that is no plain URL."""
        self.uri = uri
        self.pace = pace or SnapshotPace()
        given = options or S3Options()
        timeout = min(given.read_timeout_s, _READ_TIMEOUT_S)
        self._bucket = Bucket(S3Target.parse(uri), given.model_copy(update={"read_timeout_s": timeout}))
        self._staged: set[str] = set()
        self._sender = Sender(ResumeFile(), damaged=changed)  # for retries of this start only
        self._sender.store = self._bucket

    def close(self) -> None:
        """Close connections."""
        self._bucket.close()

    def probe(self) -> Proof:
        """Write, replace, complete, list and delete a probe object."""
        server = self._sender.server
        self._bucket.names(".abliterate-probe")
        lacks = "the S3 server ignores conditional requests: two runs of one job notice each other only after a delay"
        # Only capabilities that matter to mirrors are repeated.
        quirks = (
            *(() if server.conditional else (lacks,)),
            *(quirk for quirk in server.quirks if "two jobs" not in quirk),
        )
        return Proof("files can be written, replaced, listed and deleted", server.conditional, quirks)

    def prepare(self) -> None:
        """Detect the server's capabilities; the bucket must exist."""
        _ = self._sender.server

    def jobs(self) -> list[str]:
        """Return the jobs with a head."""
        names = [name.split("/") for name in self._bucket.names()]
        return sorted(parts[0] for parts in names if len(parts) == 2 and parts[1] == HEAD)

    def read(self, job: str) -> Stored | None:
        """Return the head."""
        try:
            found = self._bucket.read(f"{job}/{HEAD}", MOST_HEAD_BYTES)
        except TooLargeError as error:
            raise oversized_head(self.uri, job) from error
        # A head without our checksum is returned too: its reader reports what is wrong.
        return Stored(found[0], str(found[1]["ETag"]), _age(found[1])) if found else None

    def names(self, job: str) -> list[str]:
        """Return all objects except the head."""
        found = (name.removeprefix(f"{job}/") for name in self._bucket.names(f"{job}/"))
        return [name for name in found if name != HEAD]

    def stage(self, job: str, objects: Mapping[str, tuple[Path, MirroredFile]], check: Callable[[], None]) -> None:
        """Upload objects, large ones in parts to bound memory."""
        for object_name, (source, entry) in objects.items():
            name = f"{job}/{OBJECTS}/{object_name}"
            if name in self._staged:
                continue  # from an earlier try: a name determines the contents
            check()
            wanted = ManifestEntry(sha256=entry.sha256, size=entry.size)
            self._sender.send(source, name, wanted, {}, lambda _: check())  # an exception of it ends the upload
            self._staged.add(name)

    def replace(self, job: str, data: bytes, expected: Stored | None, remove: Collection[str]) -> Stored:
        """Put the head if the expected one is current."""
        if self._sender.server.conditional:
            stored = self._put(job, data, {"IfMatch": expected.token} if expected else {"IfNoneMatch": "*"})
        else:
            stored = self._put_and_look(job, data, expected)
        for name in remove:
            try:
                self._bucket.delete(f"{job}/{OBJECTS}/{name}")
            except RefusedError:
                break  # the head is written; leftovers are swept at the next start
        return stored

    def _put(self, job: str, data: bytes, condition: Mapping[str, str]) -> Stored:
        try:
            answer = self._bucket.put(f"{job}/{HEAD}", data, self._sender.server.algorithm, condition)
        except RefusedError as error:
            if not error.conflicting:
                raise
            raise ConflictError(self.read(job)) from error
        return Stored(data, str(answer["ETag"]), 0.0)

    def _put_and_look(self, job: str, data: bytes, expected: Stored | None) -> Stored:
        """Replace the head without conditional requests: read before and after."""
        found = self.read(job)
        if (found and found.data) != (expected and expected.data):
            raise ConflictError(found)
        self._put(job, data, {})
        time.sleep(_SETTLE_S)
        found = self.read(job)
        if found is None or found.data != data:
            raise ConflictError(found)
        return found

    def sweep(self, job: str, keep: AbstractSet[str]) -> None:
        """Delete unreferenced objects and abort abandoned uploads."""
        root = f"{job}/{OBJECTS}/"
        for name in self._bucket.names(root):
            if name.removeprefix(root) not in keep:
                self._bucket.delete(name)
        for name, upload in self._bucket.uploads(root):
            self._bucket.abort(name, upload)

    def fetch(self, job: str, entry: MirroredFile, target: Path) -> None:
        """Download an object in ranges."""
        name = f"{job}/{OBJECTS}/{entry.object}"
        with target.open("wb") as file:
            for start in range(0, max(entry.size, 1), _FETCHED):
                # An empty object has no ranges.
                ranged = {"Range": f"bytes={start}-{start + _FETCHED - 1}"} if entry.size > _FETCHED else {}
                try:
                    found = self._bucket.read(name, min(_FETCHED, entry.size - start), **ranged)
                except TooLargeError as error:
                    raise OversizedError from error
                if found is None:
                    raise FileNotFoundError(name)
                file.write(found[0])


def _age(answer: Mapping[str, Any]) -> float | None:
    """Return the least seconds since an object was written, by the server's clock only."""
    date = answer.get("ResponseMetadata", {}).get("HTTPHeaders", {}).get("date", "")
    written = answer.get("LastModified")
    try:
        now = parsedate_to_datetime(date)
    except ValueError:
        return None
    # Both are truncated to whole seconds.
    return max((now - written).total_seconds() - 1.0, 0.0) if isinstance(written, datetime) else None
