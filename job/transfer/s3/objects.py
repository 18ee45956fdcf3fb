"""Fingerprints of local files, and descriptions of remote S3 objects."""

from __future__ import annotations

import hashlib
import re
from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from job.records import ManifestEntry

Algorithm = Literal["sha256", "md5"]

# Object metadata by which our objects are known: the sha256 of the file and, in bytes, the size of its parts.
SHA256_KEY, PART_KEY = "abliterate-sha256", "abliterate-part-bytes"
_BLOCK = 1 << 20
_MD5_ETAG = re.compile(r'"?([0-9a-f]{32}(?:-\d+)?)"?')


@dataclass(frozen=True)
class Part:
    """A part of a multipart upload, numbered from 1, with the digest of its bytes."""

    number: int
    etag: str
    digest: bytes


@dataclass(frozen=True)
class RemoteObject:
    """Attributes of a remote object.

    Attributes:
        sha256: Hash stored by us; None: not our object.
        part_bytes: Size of its parts, stored by us; 0: one piece.
        checksum: Base64 SHA-256 without the number of parts; None: not kept.
        md5: The ETag if it is made of MD5s: it is not where a key encrypts the object.
    """

    size: int
    etag: str
    sha256: str | None
    part_bytes: int
    checksum: str | None
    md5: str | None


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

    @classmethod
    def of(cls, entry: ManifestEntry, algorithm: Algorithm, digests: Sequence[bytes], part_bytes: int = 0) -> Self:
        """Make it from the digests of a file's parts, or of the whole file if sent in one piece (`part_bytes` 0)."""
        whole, parts = (digest(algorithm, b"".join(digests)), f"-{len(digests)}") if part_bytes else (digests[0], "")
        checksum = b64encode(whole).decode() if algorithm == "sha256" else whole.hex() + parts
        return cls(entry.size, entry.sha256, part_bytes, algorithm, checksum)

    def difference(self, remote: RemoteObject | None) -> str | None:
        """Return how an object differs from the file, or None."""
        if remote is None:
            return "it is missing"
        if remote.size != self.size:
            return f"it has {remote.size} bytes instead of {self.size}"
        if (remote.sha256, remote.part_bytes) != (self.sha256, self.part_bytes):
            return "it was written by someone else"
        if self.algorithm == "sha256":
            # The server was seen to keep such checksums: an object without one was not made by this upload.
            return None if remote.checksum == self.checksum else "its SHA-256 checksum differs"
        return None if remote.md5 in (None, self.checksum) else "its MD5 differs"


def metadata_of(sha256: str, part_bytes: int = 0) -> dict[str, str]:
    """Return the metadata stored with an object: its SHA-256 and, after a multipart upload, the part size."""
    return {SHA256_KEY: sha256} | ({PART_KEY: str(part_bytes)} if part_bytes else {})


def digest(algorithm: Algorithm, data: bytes) -> bytes:
    """Return the digest of a part."""
    return hashlib.new(algorithm, data, usedforsecurity=False).digest()


def fingerprint(path: Path, part_bytes: int, algorithm: Algorithm) -> Fingerprint:
    """Return a file's fingerprint, reading block by block."""
    size = path.stat().st_size
    whole = hashlib.sha256()
    digests = []
    with path.open("rb") as file:
        for _part in range(max(1, -(-size // (part_bytes or max(size, 1))))):
            part = hashlib.new(algorithm, usedforsecurity=False)
            left = part_bytes or size
            while block := file.read(min(left, _BLOCK)):
                whole.update(block)
                part.update(block)
                left -= len(block)
            digests.append(part.digest())
    return Fingerprint.of(ManifestEntry(sha256=whole.hexdigest(), size=size), algorithm, digests, part_bytes)


def described(answer: Mapping[str, Any]) -> RemoteObject:
    """Describe an object from a HEAD or GET response."""
    metadata = {name.lower(): value for name, value in answer.get("Metadata", {}).items()}
    part, checksum = metadata.get(PART_KEY, "0"), answer.get("ChecksumSHA256")
    keyed = answer.get("ServerSideEncryption", "AES256") != "AES256" or "SSECustomerAlgorithm" in answer
    return RemoteObject(
        size=answer.get("ContentLength", 0),  # a torn answer may lack it
        etag=answer["ETag"],
        sha256=metadata.get(SHA256_KEY),
        part_bytes=int(part) if part.isdecimal() else 0,
        checksum=checksum.partition("-")[0] if checksum else None,  # some servers leave "-PARTS" out
        md5=None if keyed else md5_of(answer["ETag"]),
    )


def md5_of(etag: str) -> str | None:
    """Return an ETag in MD5 form without quotes, else None."""
    match = _MD5_ETAG.fullmatch(etag)
    return match[1] if match else None
