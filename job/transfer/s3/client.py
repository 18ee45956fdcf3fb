"""A bucket and prefix of an S3 server. botocore repeats failed requests; longer failures are the callers'."""

from __future__ import annotations

import hashlib
import io
import threading
import time
from base64 import b64encode
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import CancelledError
from contextlib import closing
from typing import Any

from job.system.failpoints import reached
from job.transfer.s3.connection import connect
from job.transfer.s3.failures import RefusedError, TooLargeError, explained
from job.transfer.s3.objects import Algorithm, Fingerprint, Part, RemoteObject, described, digest, metadata_of
from job.transfer.s3.options import S3Options, S3Target

_NEVER = threading.Event()
# Of an object that is read into memory, unless the reader knows better.
MOST_BYTES = 64 << 20
_LOOKS, _POLL_S = 4, 0.5


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

    def close(self) -> None:
        """Close connections."""
        self._client.close()

    def call(self, method: str, name: str, needs: str = "ResponseMetadata", **parameters: Any) -> dict[str, Any]:
        """Make a request about an object. An answer without the field `needs` is taken for a broken line."""
        with explained(method, self.target):
            request = {"Bucket": self.target.bucket, "Key": self.target.key(name), **parameters}
            answer: dict[str, Any] = getattr(self._client, method)(**request)
            _ = answer[needs]
        reached(f"s3:{method}")
        return answer

    def pages(self, method: str, **parameters: Any) -> Iterator[dict[str, Any]]:
        """Yield the answers to a request that lists something."""
        with explained(method, self.target):
            for page in self._client.get_paginator(method).paginate(Bucket=self.target.bucket, **parameters):
                _ = page["IsTruncated"]  # botocore takes an answer without contents for an empty list
                yield page

    def names(self, prefix: str = "") -> list[str]:
        """Return the names of the objects under a prefix."""
        pages = self.pages("list_objects_v2", Prefix=self.target.key(prefix))
        return [self.target.name(item["Key"]) for page in pages for item in page.get("Contents", [])]

    def _find(self, method: str, name: str, **parameters: str) -> dict[str, Any] | None:
        try:
            return self.call(method, name, "ETag", **parameters)
        except RefusedError as error:
            if not error.missing:
                raise
            return None

    def read(self, name: str, most: int = MOST_BYTES, **ranged: str) -> tuple[bytes, dict[str, Any]] | None:
        """Return a small object's or Range's contents, and other fields, or None. Raises TooLargeError.

        It is read again while the line breaks, or the contents do not have the hash that we gave the object.
        """
        looks = _LOOKS
        while (answer := self._find("get_object", name, **ranged)) is not None:
            looks -= 1
            try:
                # Not `with answer["Body"]`: that gives out the stream below, which does not notice a cut.
                with closing(answer["Body"]) as stream, explained("get_object", self.target):
                    if answer["ContentLength"] > most:  # no more than this is read, whatever the server sends
                        raise TooLargeError(self.target, name, most)
                    data: bytes = stream.read()
            except RefusedError:
                if not looks:
                    raise
                continue
            if not looks or ranged or described(answer).sha256 == hashlib.sha256(data).hexdigest():
                return data, answer
        return None

    def look_up(self, name: str) -> RemoteObject | None:
        """Return an object, or None, reading again if its headers seem torn."""
        for _look in range(_LOOKS):
            if (answer := self._find("head_object", name, ChecksumMode="ENABLED")) is None:
                return None
            there = described(answer)
            if there.sha256 is not None:
                break
        return there

    def difference(self, name: str, wanted: Fingerprint, seconds: float = 1.0) -> str | None:
        """Return how an object still differs from a file after some seconds, or None.

        A cut line tears headers, and a server may still be completing an upload.
        """
        end = time.monotonic() + seconds
        while (reason := wanted.difference(self.look_up(name))) is not None and time.monotonic() < end:
            time.sleep(_POLL_S)
        return reason

    def put(self, name: str, data: bytes, algorithm: Algorithm, condition: Mapping[str, str]) -> dict[str, Any]:
        """Write an object under IfNoneMatch or IfMatch."""
        metadata = metadata_of(hashlib.sha256(data).hexdigest())
        sent = {"Body": data, "Metadata": metadata, **_checksum(algorithm, digest(algorithm, data)), **condition}
        return self.call("put_object", name, "ETag", **sent, **self.options.encryption)

    def delete(self, name: str) -> None:
        """Delete an object."""
        self.call("delete_object", name)

    def begin(self, name: str, metadata: Mapping[str, str], algorithm: Algorithm) -> str:
        """Start a multipart upload; return its id."""
        kept = {"ChecksumAlgorithm": "SHA256", "ChecksumType": "COMPOSITE"} if algorithm == "sha256" else {}
        made = {"Metadata": metadata, **kept, **self.options.encryption}
        return str(self.call("create_multipart_upload", name, "UploadId", **made)["UploadId"])

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
        hashed = digest(algorithm, data)
        with Body(data, stop) as body:  # closed: botocore's cycles of references would hold it in memory for a while
            sent = {"UploadId": upload, "PartNumber": number, "Body": body, **_checksum(algorithm, hashed)}
            return Part(number, str(self.call("upload_part", name, "ETag", **sent)["ETag"]), hashed)

    def parts(self, name: str, upload: str) -> dict[int, Mapping[str, Any]]:
        """Return the parts of an upload by number."""
        pages = self.pages("list_parts", Key=self.target.key(name), UploadId=upload)
        return {part["PartNumber"]: part for page in pages for part in page.get("Parts", [])}

    def complete(
        self, name: str, upload: str, parts: Iterable[Part], algorithm: Algorithm, condition: Mapping[str, str]
    ) -> None:
        """Make an object of parts under IfNoneMatch or IfMatch."""
        listed = []
        for part in parts:
            kept = {"ChecksumSHA256": b64encode(part.digest).decode()} if algorithm == "sha256" else {}
            listed.append({"PartNumber": part.number, "ETag": part.etag, **kept})
        self.call("complete_multipart_upload", name, UploadId=upload, MultipartUpload={"Parts": listed}, **condition)

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

    def abort_listed(self, name: str) -> int:
        """Abort an object's started uploads; return their number."""
        # The prefix is the whole name: MinIO lists nothing under a part of one.
        return sum(self.abort(name, upload) for other, upload in self.uploads(name) if other == name)


def _checksum(algorithm: Algorithm, hashed: bytes) -> dict[str, str]:
    encoded = b64encode(hashed).decode()
    return (
        {"ChecksumAlgorithm": "SHA256", "ChecksumSHA256": encoded} if algorithm == "sha256" else {"ContentMD5": encoded}
    )
