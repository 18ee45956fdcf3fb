"""S3 targets and transfer options."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal
from urllib.parse import urlparse

from job.config.sections import S3Settings
from job.errors import UsageError

MIB = 1 << 20
# Hosts of servers for all buckets of a region; some also answer to BUCKET.HOST.
_SHARED_HOST = re.compile(r"(.*\.)?(s3[.-]|digitaloceanspaces\.|linodeobjects\.|r2\.)")
MOST_PARTS = 10_000  # of an object


class S3Options(S3Settings):
    """Access to an S3 server: the settings, with defaults, and the times that none of them sets.

    Raises UsageError for a KMS key without "aws:kms"; without a key, "aws:kms" takes the account's own.

    Attributes:
        part_mib: Raised for files of more than 10,000 parts.
        patience_s: Seconds without progress after which a delivery gives up an unreachable server.
    """

    addressing_style: Literal["auto", "path", "virtual"] = "auto"
    checksums: Literal["auto", "when_required"] = "auto"
    part_mib: int = 16
    parallel_parts: int = 4
    patience_s: float = 600.0
    connect_timeout_s: float = 10.0
    read_timeout_s: float = 60.0

    def model_post_init(self, _context: object) -> None:
        """Raise UsageError for a KMS key that nothing would use."""
        if self.kms_key is not None and self.sse != "aws:kms":
            raise UsageError("a KMS key is given but the encryption is not aws:kms", remedy="set both or neither")

    @property
    def encryption(self) -> dict[str, str]:
        """Encryption parameters of new objects; no ACL is ever set."""
        wanted = {"ServerSideEncryption": self.sse, "SSEKMSKeyId": self.kms_key}
        return {name: value for name, value in wanted.items() if value is not None}

    def part_bytes(self, size: int) -> int:
        """Return the part size in bytes for a file of this size: whole MiB, equal except the last."""
        least = math.ceil(size / MOST_PARTS / MIB)
        return max(self.part_mib, least) * MIB


@dataclass(frozen=True)
class S3Target:
    """A parsed s3://bucket/prefix."""

    bucket: str
    prefix: str

    @classmethod
    def parse(cls, uri: str) -> S3Target:
        """Parse a URI. Raises UsageError unless it is s3://bucket or s3://bucket/prefix."""
        parsed = urlparse(uri, allow_fragments=False)
        if parsed.scheme != "s3" or not parsed.netloc or parsed.query:
            raise UsageError(f"{uri} is not an S3 target", remedy="write s3://bucket/prefix")
        return cls(parsed.netloc, parsed.path.strip("/"))

    def refuse_in(self, endpoint: str) -> None:
        """Raise UsageError for an endpoint with the bucket, as dashboards show it: requests would name it twice."""
        parsed = urlparse(endpoint)
        path, _, last = parsed.path.rstrip("/").rpartition("/")
        host = parsed.netloc.rpartition("@")[2]
        if last == self.bucket:
            right = parsed._replace(netloc=host, path=path)
        elif host.startswith(f"{self.bucket}.") and _SHARED_HOST.match(host.removeprefix(f"{self.bucket}.")):
            right = parsed._replace(netloc=host.removeprefix(f"{self.bucket}."))
        else:
            return
        raise UsageError(
            f"the S3 endpoint {parsed._replace(netloc=host).geturl()} names the bucket {self.bucket}, as {self} does",
            remedy=f"--set s3.endpoint={right.geturl()} (or in AWS_ENDPOINT_URL)",
        )

    def key(self, name: str) -> str:
        """Return the key of an export's file."""
        return f"{self.prefix}/{name}" if self.prefix else name

    def name(self, key: str) -> str:
        """Return the name of the file under a key."""
        return key.removeprefix(self.key(""))

    def __str__(self) -> str:
        return f"s3://{self.bucket}/{self.prefix}"
