"""Upload of a file in one piece."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from job.transfer.s3.capabilities import S3Capabilities
from job.transfer.s3.client import S3Client
from job.transfer.s3.failures import RefusedError, conflict
from job.transfer.s3.objects import Fingerprint, checked, checksum_of, digest, lasting_difference


def put(store: S3Client, server: S3Capabilities, key: str, data: bytes, conditions: Mapping[str, str]) -> Fingerprint:
    """Write an object under IfNoneMatch or IfMatch; return its fingerprint. Raises DeliveryError."""
    found = digest(server.algorithm, data)
    checksum = checksum_of(server.algorithm, {1: found}, 0)
    wanted = Fingerprint(len(data), hashlib.sha256(data).hexdigest(), 0, server.algorithm, checksum)
    try:
        store.call(
            "put_object",
            Key=key,
            Body=data,
            Metadata=wanted.metadata,
            **checked(server.algorithm, found),
            **store.encryption,
            **conditions,
        )
    except RefusedError as error:
        if error.status not in (404, 409, 412) or error.code == "NoSuchBucket":
            raise
        # A try whose answer got lost may have written it already.
        if lasting_difference(store, key, wanted, md5_etags=server.md5_etags) is not None:
            raise conflict(store.target, key) from error
    return wanted
