"""Permissions and capabilities of an S3 server, found by trying."""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Callable
from contextlib import closing
from typing import Literal

from job.errors import DeliveryError
from job.records import ManifestEntry, Record
from job.transfer.s3.client import S3Client
from job.transfer.s3.failures import RefusedError
from job.transfer.s3.objects import Algorithm, Fingerprint, Part, digest, metadata_of
from job.transfer.s3.options import S3Options, S3Target

_CONTENTS = b"abliterate: a probe of this S3 target, to be deleted at once\n"
_ENTRY = ManifestEntry(sha256=hashlib.sha256(_CONTENTS).hexdigest(), size=len(_CONTENTS))
_IMPORTED = secrets.token_hex(6)


class S3Capabilities(Record):
    """Observed capabilities of a server.

    Attributes:
        conditional: A put of a new object fails if one exists; one that replaces a given object fails for another.
        conditional_complete: Completing a multipart upload respects such conditions too.
        sha256_checksums: SHA-256 checksums are kept, for single and multipart objects. If not, ETags are MD5s.
    """

    version: Literal[3] = 3
    conditional: bool
    conditional_complete: bool
    sha256_checksums: bool

    @property
    def algorithm(self) -> Algorithm:
        """Checksum algorithm for uploads to this server."""
        return "sha256" if self.sha256_checksums else "md5"

    @property
    def quirks(self) -> tuple[str, ...]:
        """Missing capabilities, for people."""
        overwrites = "does not refuse to overwrite (conditional requests): two jobs that deliver there are not noticed"
        no_checksums = "keeps no SHA-256 checksums: MD5 is compared instead"
        return (
            *(() if self.conditional and self.conditional_complete else (f"the S3 server {overwrites}",)),
            *(() if self.sha256_checksums else (f"the S3 server {no_checksums}",)),
        )


def probe(uri: str, options: S3Options | None = None) -> S3Capabilities:
    """Try everything that a delivery needs under a target, and leave nothing behind.

    Raises DeliveryError, which names a missing permission, or UsageError for the target or the endpoint.
    """
    with closing(S3Client(S3Target.parse(uri), options or S3Options())) as store:
        return detect(store)


def detect(store: S3Client) -> S3Capabilities:
    """Probe with an open client. Raises DeliveryError if a delivery cannot succeed."""
    # The same in every try of this process: what a broken line has left of one is removed by the next.
    name = f".abliterate-probe-{_IMPORTED}-{os.getpid()}"
    try:
        try:
            capabilities = _try_requests(store, name, "sha256" if store.options.checksums == "auto" else "md5")
        except RefusedError as error:
            if not error.unsupported:
                raise
            capabilities = _try_requests(store, name, "md5")  # B2 has refused other checksums
    except BaseException as error:  # also where a signal ends it
        if not isinstance(error, RefusedError) or error.status:
            _remove(store, name, quietly=True)
        raise
    _remove(store, name)
    return capabilities


def _try_requests(store: S3Client, name: str, algorithm: Algorithm) -> S3Capabilities:
    def refuses(**condition: str) -> bool:
        return _refuses(lambda: store.put(name, _CONTENTS, algorithm, condition))

    store.put(name, _CONTENTS, algorithm, {})
    single = store.look_up(name)
    conditional = refuses(IfNoneMatch="*") and refuses(IfMatch=f'"{"0" * 32}"')
    # Ceph 16 refuses what does hold as well: it compares the ETag with its quotes.
    conditional = conditional and not refuses(IfMatch=single.etag if single else "")
    upload, part = _begin(store, name, algorithm)
    store.complete(name, upload, [part], algorithm, {})
    in_parts = store.look_up(name)
    upload, part = _begin(store, name, algorithm)
    completes = _refuses(lambda: store.complete(name, upload, [part], algorithm, {"IfNoneMatch": "*"}))
    try:
        store.call("abort_multipart_upload", name, UploadId=upload)
    except RefusedError as error:
        if not error.missing:  # it is over where it has been completed
            raise

    def keeps(algorithm: Algorithm) -> bool:
        digests = [digest(algorithm, _CONTENTS)]
        return all(
            wanted.difference(there) is None and (algorithm == "sha256" or (there and there.md5 == wanted.checksum))
            for part_bytes, there in ((0, single), (_ENTRY.size, in_parts))
            for wanted in [Fingerprint.of(_ENTRY, algorithm, digests, part_bytes)]
        )

    sha256 = keeps("sha256")
    if not sha256 and not keeps("md5"):
        raise DeliveryError(
            f"{store.target}: the S3 server keeps neither SHA-256 checksums nor MD5s: uploads cannot be verified",
            remedy="use another S3 server",
        )
    return S3Capabilities(conditional=conditional, conditional_complete=completes, sha256_checksums=sha256)


def _refuses(request: Callable[[], object]) -> bool:
    """Return whether the condition of a request is respected: not if it is ignored or not understood."""
    try:
        request()
    except RefusedError as error:
        if not (error.unsupported or error.status in (404, 409, 412)):
            raise
        return error.status == 412
    return False


def _begin(store: S3Client, name: str, algorithm: Algorithm) -> tuple[str, Part]:
    """Start an upload and send its only part; return its id and the part."""
    upload = store.begin(name, metadata_of(_ENTRY.sha256, _ENTRY.size), algorithm)
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
