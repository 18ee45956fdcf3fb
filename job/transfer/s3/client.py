"""A bucket and prefix of an S3 server. botocore repeats failed requests; longer failures are the callers'."""

from __future__ import annotations

import hashlib
import io
import threading
import time
from base64 import b64encode
from collections.abc import Iterable, Iterator, Mapping, Set
from concurrent.futures import CancelledError
from typing import Any

from job.system.failpoints import reached
from job.system.retry import backoff_s, retried
from job.transfer.s3.connection import ATTEMPTS, connect
from job.transfer.s3.failures import RefusedError, TooLargeError, TornAnswerError, explained
from job.transfer.s3.objects import (
    Algorithm,
    Fingerprint,
    Part,
    RemoteObject,
    described,
    difference,
    digest,
    metadata_of,
)
from job.transfer.s3.options import S3Options, S3Target

_NEVER = threading.Event()
# Of an object that is read into memory, unless the reader knows better.
MOST_BYTES = 64 << 20
_LOOKS, _POLL_S = 4, 0.5
# What every whole answer has. A line that is cut within the headers leaves an answer that looks whole to botocore.
_WHOLE = {
    **dict.fromkeys(("put_object", "upload_part"), frozenset({"ETag"})),
    **dict.fromkeys(("get_object", "head_object"), frozenset({"ETag", "ContentLength"})),
    **dict.fromkeys(("list_parts", "list_multipart_uploads", "list_objects_v2"), frozenset({"IsTruncated"})),
    "create_multipart_upload": frozenset({"UploadId"}),
}


class Body(io.BytesIO):
    """Bytes to send; reading them fails when the upload ends."""

    def __init__(self, data: bytes, stop: threading.Event) -> None:
        super().__init__(data)
        self.stop = stop

    def read(self, size: int | None = -1) -> bytes:
        """Return the next bytes. Raises CancelledError, after which botocore does not try again."""
        if self.stop.is_set():
            raise CancelledError
        return super().read(size)


class S3Client:
    """A bucket with a prefix, before which names stand; thread-safe. Its requests raise RefusedError."""

    def __init__(self, target: S3Target, options: S3Options) -> None:
        """Make a client; nothing is sent yet. Raises DeliveryError or UsageError for an unusable setting."""
        self.target, self.options = target, options
        with explained("", target):
            self._client = connect(target, options)

    def __enter__(self) -> S3Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close connections."""
        self._client.close()

    def call(self, method: str, name: str, **parameters: Any) -> dict[str, Any]:
        """Make a request about an object."""
        answer = retried(lambda: self._once(method, name, parameters), _after_torn)
        reached(f"s3:{method}")
        return answer

    def _once(self, method: str, name: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
        request = {"Bucket": self.target.bucket, "Key": self.target.key(name), **parameters}
        with explained(method, self.target):
            answer = getattr(self._client, method)(**request)
        return self._whole(method, answer)

    def _whole(self, method: str, answer: dict[str, Any]) -> dict[str, Any]:
        if not _WHOLE.get(method, frozenset()) <= answer.keys():
            raise TornAnswerError(self.target)
        return answer

    def pages(self, method: str, **parameters: Any) -> Iterator[dict[str, Any]]:
        """Yield the answers to a request that lists something."""
        with explained(method, self.target):
            for page in self._client.get_paginator(method).paginate(Bucket=self.target.bucket, **parameters):
                yield self._whole(method, page)

    def names(self, prefix: str = "") -> list[str]:
        """Return the names of the objects under a prefix."""
        pages = self.pages("list_objects_v2", Prefix=self.target.key(prefix))
        return [self.target.name(item["Key"]) for page in pages for item in page.get("Contents", [])]

    def read(self, name: str, most: int = MOST_BYTES, **parameters: str) -> tuple[bytes, dict[str, Any]]:
        """Return a small object's or Range's contents, and other fields. Raises TooLargeError."""
        from botocore.exceptions import BotoCoreError

        def once() -> tuple[bytes, dict[str, Any]]:
            answer = self._once("get_object", name, parameters)
            # Not as a context manager: that gives out the stream below, which does not notice a cut.
            stream = answer["Body"]
            try:
                if answer["ContentLength"] > most:  # no more than this is read, whatever the server sends
                    raise TooLargeError(self.target, name, most)
                return stream.read(), answer
            except BotoCoreError as error:
                raise TornAnswerError(self.target) from error
            finally:
                stream.close()

        return retried(once, _after_torn)

    def look_up(self, name: str) -> RemoteObject | None:
        """Return an object, or None, reading again if its headers seem torn."""
        for _look in range(_LOOKS):
            try:
                there = described(self.call("head_object", name, ChecksumMode="ENABLED"))
            except RefusedError as error:
                if error.missing:
                    return None
                raise
            if there.sha256 is not None:
                break
        return there

    def difference(self, name: str, wanted: Fingerprint, seconds: float = 1.0) -> str | None:
        """Return how an object still differs from a file after some seconds, or None.

        A cut line tears headers, and a server may still be completing an upload.
        """
        end = time.monotonic() + seconds
        while (reason := difference(self.look_up(name), wanted)) is not None and time.monotonic() < end:
            time.sleep(_POLL_S)
        return reason

    def put(self, name: str, data: bytes, algorithm: Algorithm, condition: Mapping[str, str]) -> dict[str, Any]:
        """Write an object under IfNoneMatch or IfMatch."""
        metadata = metadata_of(hashlib.sha256(data).hexdigest())
        sent = {"Body": data, "Metadata": metadata, **_checked(algorithm, digest(algorithm, data)), **condition}
        return self.call("put_object", name, **sent, **self.options.encryption)

    def delete(self, name: str) -> None:
        """Delete an object."""
        self.call("delete_object", name)

    def begin(self, name: str, metadata: Mapping[str, str], algorithm: Algorithm) -> str:
        """Start a multipart upload; return its id."""
        kept = {"ChecksumAlgorithm": "SHA256", "ChecksumType": "COMPOSITE"} if algorithm == "sha256" else {}
        made = {"Metadata": metadata, **kept, **self.options.encryption}
        return str(self.call("create_multipart_upload", name, **made)["UploadId"])

    def send(
        self,
        name: str,
        upload: str,
        number: int,
        data: bytes,
        algorithm: Algorithm,
        stop: threading.Event = _NEVER,
    ) -> Part:
        """Send a part. Raises CancelledError after `stop`."""
        found = digest(algorithm, data)
        with Body(data, stop) as body:  # closed: botocore's cycles of references would hold it in memory for a while
            sent = {"UploadId": upload, "PartNumber": number, "Body": body, **_checked(algorithm, found)}
            return Part(number, str(self.call("upload_part", name, **sent)["ETag"]), found)

    def parts(self, name: str, upload: str) -> dict[int, Mapping[str, Any]]:
        """Return the parts of an upload by number."""
        pages = self.pages("list_parts", Key=self.target.key(name), UploadId=upload)
        return {part["PartNumber"]: part for page in pages for part in page.get("Parts", [])}

    def complete(
        self, name: str, upload: str, parts: Iterable[Part], algorithm: Algorithm, condition: Mapping[str, str]
    ) -> None:
        """Make an object of parts under IfNoneMatch or IfMatch."""
        named = []
        for part in parts:
            kept = {"ChecksumSHA256": b64encode(part.digest).decode()} if algorithm == "sha256" else {}
            named.append({"PartNumber": part.number, "ETag": part.etag, **kept})
        self.call("complete_multipart_upload", name, UploadId=upload, MultipartUpload={"Parts": named}, **condition)

    def abort(self, name: str, upload: str) -> bool:
        """Abort an upload, whose parts cost money; return whether it is gone. Missing permission is no failure."""
        try:
            self.call("abort_multipart_upload", name, UploadId=upload)
        except RefusedError as error:
            return error.missing
        return True

    def uploads(self, prefix: str) -> list[tuple[str, str]]:
        """Return name and id of the started uploads under a prefix; none without permission to list them."""
        try:
            pages = list(self.pages("list_multipart_uploads", Prefix=self.target.key(prefix)))
        except RefusedError as error:
            if error.transient:
                raise
            return []
        return [(self.target.name(one["Key"]), one["UploadId"]) for page in pages for one in page.get("Uploads", [])]

    def abort_listed(self, name: str, *, but: Set[str] = frozenset()) -> int:
        """Abort an object's started uploads, except these ids; return their number."""
        # The prefix is the whole name: MinIO lists nothing under a part of one.
        found = [upload for other, upload in self.uploads(name) if other == name and upload not in but]
        return sum(self.abort(name, upload) for upload in found)


def _checked(algorithm: Algorithm, found: bytes) -> dict[str, str]:
    encoded = b64encode(found).decode()
    if algorithm == "sha256":
        return {"ChecksumAlgorithm": "SHA256", "ChecksumSHA256": encoded}
    return {"ContentMD5": encoded}


def _after_torn(error: Exception, failures: int) -> float | None:
    return backoff_s(failures, 0.1, 1.0) if isinstance(error, TornAnswerError) and failures < ATTEMPTS else None
