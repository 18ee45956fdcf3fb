"""Fingerprints of local files, and descriptions of remote S3 objects."""

from __future__ import annotations

import hashlib
import itertools
import re
import time
from base64 import b64encode
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from job.transfer.s3.client import S3Client
from job.transfer.s3.failures import RefusedError

Algorithm = Literal["sha256", "md5"]

# Object metadata by which our objects are known: the sha256 of the file and, in bytes, the size of its parts.
SHA256_KEY, PART_KEY = "abliterate-sha256", "abliterate-part-bytes"
_BLOCK = 1 << 20
_LOOKS = 4
_MD5_ETAG = re.compile(r"[0-9a-f]{32}(-\d+)?")


@dataclass(frozen=True)
class Fingerprint:
    """Expected attributes of an object that holds a file.

    Attributes:
        part_bytes: Size of its parts; 0: one piece.
        checksum: sha256: base64, over the parts' digests if in parts; md5: the ETag.
    """

    size: int
    sha256: str
    part_bytes: int
    algorithm: Algorithm
    checksum: str

    @property
    def metadata(self) -> dict[str, str]:
        """Metadata to store with the object."""
        return object_metadata(self.sha256, self.part_bytes)


@dataclass(frozen=True)
class RemoteObject:
    """Attributes of a remote object.

    Attributes:
        sha256: Hash stored by us; None: not our object.
        part_bytes: Size of its parts, stored by us; 0: one piece.
        checksum: Base64 SHA-256 without the number of parts; None: not kept.
        keyed: Encrypted so that the ETag is no MD5.
    """

    size: int
    etag: str
    sha256: str | None
    part_bytes: int
    checksum: str | None
    keyed: bool


def object_metadata(sha256: str, part_bytes: int) -> dict[str, str]:
    """Return the metadata of our objects."""
    return {SHA256_KEY: sha256} | ({PART_KEY: str(part_bytes)} if part_bytes else {})


def digest(algorithm: Algorithm, data: memoryview | bytes) -> bytes:
    """Return the digest of a part."""
    return hashlib.new(algorithm, data, usedforsecurity=False).digest()


def checksum_of(algorithm: Algorithm, digests: Mapping[int, bytes], part_bytes: int) -> str:
    """Return the server's checksum of an object of these parts (numbered from 1)."""
    if not part_bytes:
        return b64encode(digests[1]).decode() if algorithm == "sha256" else digests[1].hex()
    joined = digest(algorithm, b"".join(digests[number] for number in sorted(digests)))
    return b64encode(joined).decode() if algorithm == "sha256" else f"{joined.hex()}-{len(digests)}"


def checked(algorithm: Algorithm, checksum: bytes) -> dict[str, str]:
    """Return the parameters that make a server verify the data."""
    encoded = b64encode(checksum).decode()
    if algorithm == "sha256":
        return {"ChecksumAlgorithm": "SHA256", "ChecksumSHA256": encoded}
    return {"ContentMD5": encoded}


def fingerprint(path: Path, part_bytes: int, algorithm: Algorithm) -> Fingerprint:
    """Return a file's fingerprint, reading block by block."""
    size = path.stat().st_size
    whole = hashlib.sha256()
    digests: dict[int, bytes] = {}
    with path.open("rb") as file:
        for number in range(1, max(1, -(-size // (part_bytes or max(size, 1)))) + 1):
            part = hashlib.new(algorithm, usedforsecurity=False)
            left = part_bytes or size
            while block := file.read(min(left, _BLOCK)):
                whole.update(block)
                part.update(block)
                left -= len(block)
            digests[number] = part.digest()
    checksum = checksum_of(algorithm, digests, part_bytes)
    return Fingerprint(size, whole.hexdigest(), part_bytes, algorithm, checksum)


def look_up(store: S3Client, key: str) -> RemoteObject | None:
    """Return the object under a key, or None, reading again if it seems foreign. Raises RefusedError."""
    there: RemoteObject | None = None
    for _ in range(_LOOKS):
        try:
            there = described(store.call("head_object", Key=key, ChecksumMode="ENABLED"))
        except RefusedError as error:
            if error.status == 404 and error.code != "NoSuchBucket":
                return None
            raise
        if there.sha256 is not None:
            break
    return there


def described(answer: Mapping[str, Any]) -> RemoteObject:
    """Describe an object from a HEAD or GET response."""
    metadata = {name.lower(): value for name, value in answer.get("Metadata", {}).items()}
    checksum = answer.get("ChecksumSHA256")
    part = metadata.get(PART_KEY, "0")
    return RemoteObject(
        size=answer["ContentLength"],
        etag=answer.get("ETag", ""),
        sha256=metadata.get(SHA256_KEY),
        part_bytes=int(part) if part.isdecimal() else 0,
        # "-N" says how many parts it has; it is left out by some servers.
        checksum=checksum.partition("-")[0] if checksum else None,
        keyed=answer.get("ServerSideEncryption", "AES256") != "AES256" or "SSECustomerAlgorithm" in answer,
    )


def comparable_etag(etag: str) -> str | None:
    """Return an ETag in MD5 form without quotes, else None."""
    bare = etag.strip('"')
    return bare if _MD5_ETAG.fullmatch(bare) else None


def difference(remote: RemoteObject | None, wanted: Fingerprint, *, md5_etags: bool) -> str | None:
    """Return how an object differs from a file, or None; `md5_etags` if the server's ETags are MD5s."""
    if remote is None:
        return "it is missing"
    if remote.size != wanted.size:
        return f"it has {remote.size} bytes instead of {wanted.size}"
    if remote.sha256 != wanted.sha256 or remote.part_bytes != wanted.part_bytes:
        return "it was written by someone else"
    if wanted.algorithm == "sha256":
        # The server was seen to keep such checksums: an object without one was not made by this upload.
        return None if remote.checksum == wanted.checksum else "its SHA-256 checksum differs"
    etag = comparable_etag(remote.etag) if md5_etags and not remote.keyed else None
    return None if etag in (None, wanted.checksum) else "its MD5 differs"


def lasting_difference(
    store: S3Client, key: str, wanted: Fingerprint, *, md5_etags: bool, seconds: float = 0.0
) -> str | None:
    """Return how the object under a key differs from a file, None if it does not.

    It is looked at again where it does: a cut line tears an answer's headers, and a server may still be at work on a
    completion whose answer got lost.

    Args:
        store: Where the object is.
        key: Its key.
        wanted: The file's fingerprint.
        md5_etags: Whether the server's ETags are MD5 digests.
        seconds: How long the server may be at work on it, at least.

    Raises:
        RefusedError: The server does not say.
    """
    end = time.monotonic() + seconds
    for look in itertools.count():
        if look:
            store.pause(look)
        reason = difference(look_up(store, key), wanted, md5_etags=md5_etags)
        if reason is None or (look + 1 >= _LOOKS and time.monotonic() >= end):
            return reason
    raise AssertionError("unreachable")
