"""Permissions and capabilities of an S3 server, found by trying."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Callable, Sequence
from datetime import timedelta
from email.utils import parsedate_to_datetime
from typing import Literal

from job.records import Record
from job.transfer.s3.client import S3Client
from job.transfer.s3.failures import RefusedError
from job.transfer.s3.objects import Algorithm, Part, checksum_of, digest, metadata_of
from job.transfer.s3.options import S3Options, S3Target

_PREFIX = ".abliterate-probe-"
# Older than any probe takes: its process was killed.
_STALE = timedelta(minutes=10)
_CONTENTS = b"abliterate: a probe of this S3 target, to be deleted at once\n"
_SHA256 = hashlib.sha256(_CONTENTS).hexdigest()


class S3Capabilities(Record):
    """Observed capabilities of a server.

    Attributes:
        conditional: A put of a new object fails if one exists.
        conditional_replace: A put that replaces a given object fails only for another.
        conditional_complete: Completing a multipart upload respects such conditions too.
        sha256_checksums: SHA-256 checksums are kept, for single and multipart objects.
        md5_etags: ETags are MD5s: a single object's, and a multipart object's of its parts' MD5s.
    """

    version: Literal[2] = 2
    conditional: bool
    conditional_replace: bool
    conditional_complete: bool
    sha256_checksums: bool
    md5_etags: bool

    @property
    def algorithm(self) -> Algorithm:
        """Checksum algorithm for uploads to this server."""
        return "sha256" if self.sha256_checksums else "md5"

    def checksum(self, digests: Sequence[bytes], part_bytes: int) -> str:
        """Return the checksum that this server keeps of an object of these parts, "" if none."""
        return checksum_of(self.algorithm, digests, part_bytes) if self.sha256_checksums or self.md5_etags else ""

    @property
    def quirks(self) -> tuple[str, ...]:
        """Missing capabilities, for people."""
        found = []
        if not (self.conditional and self.conditional_complete):
            found.append(
                "does not refuse to overwrite (conditional requests): two jobs that deliver there are not noticed"
            )
        if not self.sha256_checksums:
            found.append(
                "keeps no SHA-256 checksums: MD5 is compared instead"
                if self.md5_etags
                else "gives no checksums: sizes alone are compared"
            )
        return tuple(f"the S3 server {what}" for what in found)


def probe(uri: str, options: S3Options | None = None) -> S3Capabilities:
    """Try everything that a delivery needs under a target, and leave nothing behind.

    Raises DeliveryError, which names a missing permission, or UsageError for the target or the endpoint.
    """
    with S3Client(S3Target.parse(uri), options or S3Options()) as store:
        return detect(store)


def detect(store: S3Client) -> S3Capabilities:
    """Probe with an open client. Raises DeliveryError if a delivery cannot succeed."""
    name = f"{_PREFIX}{secrets.token_hex(8)}"
    try:
        try:
            found = _tried(store, name, "sha256" if store.options.checksums == "auto" else "md5")
        except RefusedError as error:
            if not error.unsupported:
                raise
            found = _tried(store, name, "md5")  # B2 has refused other checksums
    except RefusedError as error:
        if error.status:
            _remove(store, name, quietly=True)
        raise
    _remove(store, name)
    _remove_stale(store)
    return found


def _tried(store: S3Client, name: str, algorithm: Algorithm) -> S3Capabilities:
    def puts(**condition: str) -> bool:
        return _passes(lambda: store.put(name, _CONTENTS, algorithm, condition))

    store.put(name, _CONTENTS, algorithm, {})
    conditional = not puts(IfNoneMatch="*")
    single = store.look_up(name)
    # Ceph 16 refuses what does hold as well: it compares the ETag with its quotes.
    replaces = not puts(IfMatch=f'"{"0" * 32}"') and puts(IfMatch=single.etag if single else "")
    upload, part = _begun(store, name, algorithm)
    store.complete(name, upload, [part], algorithm, {})
    in_parts = store.look_up(name)
    upload, part = _begun(store, name, algorithm)
    completes = not _passes(lambda: store.complete(name, upload, [part], algorithm, {"IfNoneMatch": "*"}))
    try:
        store.call("abort_multipart_upload", name, UploadId=upload)
    except RefusedError as error:
        if not error.missing:  # it is over where it has been completed
            raise

    def keeps(algorithm: Algorithm) -> bool:
        digests, looks = [digest(algorithm, _CONTENTS)], ((single, 0), (in_parts, len(_CONTENTS)))
        kept = [there and (there.checksum if algorithm == "sha256" else there.md5) for there, _ in looks]
        return kept == [checksum_of(algorithm, digests, part_bytes) for _, part_bytes in looks]

    return S3Capabilities(
        conditional=conditional,
        conditional_replace=replaces,
        conditional_complete=completes,
        sha256_checksums=keeps("sha256"),
        md5_etags=keeps("md5"),
    )


def _passes(request: Callable[[], object]) -> bool:
    """Return whether a conditional request is carried out, or its condition not understood."""
    try:
        request()
    except RefusedError as error:
        if not (error.unsupported or error.status in (404, 409, 412)):
            raise
        return error.status != 412
    return True


def _begun(store: S3Client, name: str, algorithm: Algorithm) -> tuple[str, Part]:
    """Start an upload and send its only part; return its id and the part."""
    upload = store.begin(name, metadata_of(_SHA256), algorithm)
    part = store.send(name, upload, 1, _CONTENTS, algorithm)
    store.parts(name, upload)  # needs a permission of its own
    return upload, part


def _remove(store: S3Client, name: str, *, quietly: bool = False) -> None:
    try:
        store.abort_listed(name)
        store.delete(name)
    except RefusedError:
        if not quietly:
            raise


def _remove_stale(store: S3Client) -> None:
    """Remove leftovers of killed probes; missing permission is no failure."""
    try:
        for answer in store.pages("list_objects_v2", Prefix=store.target.key(_PREFIX)):
            now = parsedate_to_datetime(answer["ResponseMetadata"]["HTTPHeaders"].get("date", ""))
            for item in answer.get("Contents", []):
                if now - item["LastModified"] > _STALE:
                    _remove(store, store.target.name(item["Key"]))
    except (RefusedError, ValueError):  # ValueError: a server that does not say what time it is
        return
