"""Permissions and capabilities of an S3 server, found by trying."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from email.utils import parsedate_to_datetime
from functools import partial
from typing import Any, Literal

from job.errors import DeliveryError
from job.records import Record
from job.transfer.s3.abandoned import abort, listed
from job.transfer.s3.client import S3Client
from job.transfer.s3.failures import RefusedError
from job.transfer.s3.objects import SHA256_KEY, Algorithm, checked, checksum_of, comparable_etag, digest, look_up
from job.transfer.s3.options import S3Options, S3Target

# A preflight check should not wait a quarter of an hour for a server that is not there.
_ATTEMPTS = 4
_PREFIX = ".abliterate-probe-"
# Older than any probe takes: its process was killed.
_STALE = timedelta(minutes=10)
_CONTENTS = b"abliterate: a probe of this S3 target, to be deleted at once\n"
_METADATA = {SHA256_KEY: hashlib.sha256(_CONTENTS).hexdigest()}


class S3Capabilities(Record):
    """Observed capabilities of a server.

    Attributes:
        conditional: A put of a new object fails if one exists.
        conditional_replace: A put that replaces a given object fails only for another.
        conditional_complete: Completing a multipart upload respects such conditions too.
        multipart: Multipart uploads work.
        sha256_checksums: SHA-256 checksums are kept, for single and multipart objects.
        md5_etags: A single object's ETag is its MD5.
        md5_part_etags: A multipart object's ETag is the MD5 of its parts' MD5s.
        lists_uploads: Started multipart uploads are listed.
    """

    version: Literal[1] = 1
    conditional: bool
    conditional_replace: bool
    conditional_complete: bool
    multipart: bool
    sha256_checksums: bool
    md5_etags: bool
    md5_part_etags: bool
    lists_uploads: bool

    @property
    def algorithm(self) -> Algorithm:
        """Checksum algorithm for uploads to this server."""
        return "sha256" if self.sha256_checksums else "md5"

    def has_md5_etag(self, part_bytes: int) -> bool:
        """Return whether ETags are MD5s for objects with this part size (0: one piece)."""
        return self.md5_part_etags if part_bytes else self.md5_etags

    @property
    def quirks(self) -> tuple[str, ...]:
        """Missing capabilities, for people."""
        lacks = {
            "does not refuse to overwrite (conditional requests): two jobs that deliver there are not noticed": not (
                self.conditional and self.conditional_complete
            ),
            "takes no multipart uploads": not self.multipart,
            "keeps no SHA-256 checksums: MD5 is compared instead": not self.sha256_checksums and self.md5_etags,
            "gives no checksums of files in parts: their sizes alone are compared": not self.sha256_checksums
            and self.md5_etags
            and not self.md5_part_etags,
            "gives no checksums: sizes alone are compared": not self.sha256_checksums and not self.md5_etags,
            "does not list begun uploads: abandoned ones may remain": not self.lists_uploads,
        }
        return tuple(f"the S3 server {what}" for what, lacking in lacks.items() if lacking)


def probe(uri: str, options: S3Options | None = None) -> S3Capabilities:
    """Try everything that a delivery needs under a target, and leave nothing behind.

    Raises:
        DeliveryError: A delivery cannot succeed; it names the missing permission.
        UsageError: The target is no S3 target, or the endpoint no URL or one with the bucket.
    """
    options = options or S3Options()
    patience = replace(options, attempts=min(options.attempts, _ATTEMPTS))
    with S3Client(S3Target.parse(uri), patience) as store:
        return detect(store)


def detect(store: S3Client) -> S3Capabilities:
    """Probe with an open client. Raises DeliveryError if a delivery cannot succeed."""
    return _Probe(store).run()


class _Probe:
    """One probe with its own object, and its findings so far."""

    def __init__(self, store: S3Client) -> None:
        self._store = store
        self._key = store.target.key(f"{_PREFIX}{secrets.token_hex(8)}")
        self._uploads: list[str] = []
        self._sha256 = store.options.checksums == "auto"

    def run(self) -> S3Capabilities:
        done = False
        try:
            found = self._try_everything()
            done = True
        finally:
            self._clean_up(quietly=not done)
        self._clear_stale()
        if look_up(self._store, self._key) is not None:
            raise DeliveryError(
                f"{self._store.target}: a deleted object is still there", remedy="use a bucket that deletes at once"
            )
        return found

    def _try_everything(self) -> S3Capabilities:
        conditional = self._put_new()
        remote = look_up(self._store, self._key)
        if remote is None or remote.size != len(_CONTENTS) or remote.sha256 is None:
            raise DeliveryError(
                f"{self._store.target}: the server does not keep what it is given (object metadata)",
                remedy="use another S3 server",
            )
        self._sha256 = self._sha256 and remote.checksum is not None
        md5_etags = comparable_etag(remote.etag) == digest("md5", _CONTENTS).hex() and not remote.keyed
        # Ceph 16 refuses what does hold as well: it compares the ETag with its quotes.
        replaces = self._refused(self._put, IfMatch=f'"{"0" * 32}"') and not self._refused(
            self._put, IfMatch=remote.etag
        )
        multipart, part_etags, completes = self._try_multipart(replaces=replaces)
        return S3Capabilities(
            conditional=conditional,
            conditional_replace=replaces,
            conditional_complete=completes,
            multipart=multipart,
            sha256_checksums=self._sha256,
            md5_etags=md5_etags,
            md5_part_etags=part_etags,
            lists_uploads=self._lists_uploads(),
        )

    def _put_new(self) -> bool:
        """Put the object; return whether the server refuses to create it again."""
        try:
            self._put()
        except RefusedError as error:
            if not (error.unsupported and self._sha256):
                raise
            self._sha256 = False
            self._put()
        return self._refused(self._put, IfNoneMatch="*")

    def _refused(self, request: Callable[..., None], **condition: str) -> bool:
        """Return whether a violated condition is refused."""
        try:
            request(**condition)
        except RefusedError as error:
            if error.status == 412:
                return True
            if error.unsupported or error.status in (404, 409):
                return False
            raise
        return False

    def _put(self, **condition: str) -> None:
        algorithm: Algorithm = "sha256" if self._sha256 else "md5"
        self._store.call(
            "put_object",
            Key=self._key,
            Body=_CONTENTS,
            Metadata=_METADATA,
            **checked(algorithm, digest(algorithm, _CONTENTS)),
            **self._store.encryption,
            **condition,
        )

    def _try_multipart(self, *, replaces: bool) -> tuple[bool, bool, bool]:
        """Return whether multipart uploads work, have MD5 ETags, and respect conditions on completion."""
        try:
            self._complete(*self._upload())
        except RefusedError as error:
            if not error.unsupported:
                raise
            if not self._sha256:
                return False, False, False
            self._sha256 = False
            return self._try_multipart(replaces=replaces)
        remote = look_up(self._store, self._key)
        self._sha256 = self._sha256 and remote is not None and remote.checksum is not None
        etag = checksum_of("md5", {1: digest("md5", _CONTENTS)}, len(_CONTENTS))
        part_etags = remote is not None and comparable_etag(remote.etag) == etag and not remote.keyed
        upload, part = self._upload()
        complete = partial(self._complete, upload, part)
        keeps = self._refused(complete, IfNoneMatch="*")
        if keeps and replaces and remote is not None:
            keeps = not self._refused(complete, IfMatch=remote.etag)
        try:
            self._store.call("abort_multipart_upload", Key=self._key, UploadId=upload)
        except RefusedError as error:
            if error.status != 404:  # it is over where it has been completed
                raise
        return True, part_etags, keeps

    def _upload(self) -> tuple[str, dict[str, Any]]:
        """Start an upload and send its only part; return its id and the part for completion."""
        parameters = {"ChecksumAlgorithm": "SHA256", "ChecksumType": "COMPOSITE"} if self._sha256 else {}
        answer = self._store.call(
            "create_multipart_upload", Key=self._key, Metadata=_METADATA, **parameters, **self._store.encryption
        )
        upload = str(answer["UploadId"])
        self._uploads.append(upload)
        algorithm: Algorithm = "sha256" if self._sha256 else "md5"
        checks = checked(algorithm, digest(algorithm, _CONTENTS))
        self._store.call("upload_part", Key=self._key, UploadId=upload, PartNumber=1, Body=_CONTENTS, **checks)
        listed = self._store.call("list_parts", Key=self._key, UploadId=upload).get("Parts", [])
        if [part["PartNumber"] for part in listed] != [1]:
            raise DeliveryError(f"{self._store.target}: the server loses parts", remedy="use another S3 server")
        part = {"PartNumber": 1, "ETag": listed[0]["ETag"]}
        return upload, part | ({"ChecksumSHA256": checks["ChecksumSHA256"]} if self._sha256 else {})

    def _complete(self, upload: str, part: dict[str, Any], **condition: str) -> None:
        self._store.call(
            "complete_multipart_upload",
            Key=self._key,
            UploadId=upload,
            MultipartUpload={"Parts": [part]},
            **condition,
        )

    def _lists_uploads(self) -> bool:
        """Return whether the server lists uploads; also finds one whose id was lost."""
        try:
            self._uploads += [upload for key, upload in listed(self._store, self._key) if key == self._key]
        except RefusedError as error:
            if error.unsupported or error.status == 403:
                return False
            raise
        return True

    def _clean_up(self, *, quietly: bool) -> None:
        """Remove the probe's objects; quietly if a failure is being reported."""
        for upload in self._uploads:
            abort(self._store, self._key, upload)
        try:
            self._store.call("delete_object", Key=self._key)
        except RefusedError:
            if not quietly:
                raise

    def _clear_stale(self) -> None:
        """Remove leftovers of killed probes; missing permission is no failure."""
        prefix = self._store.target.key(_PREFIX)
        try:
            answer = self._store.call("list_objects_v2", Prefix=prefix)
            now = parsedate_to_datetime(answer["ResponseMetadata"]["HTTPHeaders"].get("date", ""))
            stale = {item["Key"] for item in answer.get("Contents", []) if now - item["LastModified"] > _STALE}
            for key, upload in listed(self._store, prefix) if stale else ():
                if key in stale:
                    abort(self._store, key, upload)
            for key in stale:
                self._store.call("delete_object", Key=key)
        except (RefusedError, ValueError):  # ValueError: a server that does not say what time it is
            return
