"""A bucket and prefix of an S3 server, with retries of transient failures.

This is the only retry loop: botocore's is off, since two would multiply, and it ignores our stop signal and the
standard Retry-After header.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from typing import Any

from job.errors import DeliveryError, UsageError
from job.system.failpoints import reached
from job.text.credentials import require_clean
from job.text.redaction import redact, remember
from job.transfer.s3.failures import GivenUpError, TooLargeError, explained, retry_after_s, tries
from job.transfer.s3.options import S3Options, S3Target

_NEVER = threading.Event()
# Of an object that is read into memory, unless the reader knows better.
MOST_BYTES = 64 << 20
# What every whole answer has: all of the first, any of the second. A line that is cut within the headers, or right
# after them, leaves an answer that looks whole to everybody below.
_WHOLE: dict[str, set[str]] = {
    "put_object": {"ETag"},
    "upload_part": {"ETag"},
    "get_object": {"ETag", "ContentLength"},
    "head_object": {"ETag", "ContentLength"},
    "create_multipart_upload": {"UploadId"},
}
_SOME_OF: dict[str, set[str]] = {
    "list_parts": {"UploadId", "Key", "Bucket", "IsTruncated", "Parts"},
    "list_multipart_uploads": {"Bucket", "IsTruncated", "MaxUploads", "Uploads"},
    "list_objects_v2": {"Name", "IsTruncated", "KeyCount", "Contents", "CommonPrefixes"},
}


class Body:
    """Bytes to send from memory in place; reading stops when the upload ends."""

    def __init__(self, data: memoryview | bytes, stop: threading.Event = _NEVER) -> None:
        self._data = memoryview(data)
        self.stop = stop
        self._position = 0

    def __len__(self) -> int:
        return len(self._data)

    def read(self, size: int = -1) -> bytes:
        """Return the next bytes, all remaining ones for a negative size. Raises GivenUpError if the upload ends."""
        if self.stop.is_set():
            raise GivenUpError
        end = len(self._data) if size is None or size < 0 else self._position + size
        piece = bytes(self._data[self._position : end])
        self._position += len(piece)
        return piece

    def seek(self, offset: int, whence: int = 0) -> int:
        """Seek like a file."""
        self._position = offset + (0, self._position, len(self._data))[whence]
        return self._position

    def tell(self) -> int:
        """Return the position."""
        return self._position


class S3Client:
    """A bucket with a prefix; thread-safe."""

    def __init__(self, target: S3Target, options: S3Options) -> None:
        """Make a client; nothing is sent yet.

        Raises:
            DeliveryError: The credentials, the profile or the endpoint are not usable.
            UsageError: The endpoint is no URL, or names the bucket.
        """
        self.target = target
        self.options = options
        self._client = _client(target, options)

    def __enter__(self) -> S3Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def encryption(self) -> dict[str, str]:
        """Encryption parameters of new objects; no ACL is ever set."""
        wanted = {"ServerSideEncryption": self.options.sse, "SSEKMSKeyId": self.options.kms_key}
        return {name: value for name, value in wanted.items() if value is not None}

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Make a request with retries; a Body is rewound, and may stop them. Raises RefusedError or GivenUpError."""
        body = parameters.get("Body")

        def once() -> dict[str, Any]:
            if isinstance(body, Body):
                body.seek(0)
            answer: dict[str, Any] = getattr(self._client, method)(Bucket=self.target.bucket, **parameters)
            reached(f"s3:{method}")
            self._check_whole(method, answer)
            return answer

        return self._retried(method, once, body.stop if isinstance(body, Body) else _NEVER)

    def read(self, key: str, most: int = MOST_BYTES, **parameters: str) -> tuple[bytes, dict[str, Any]]:
        """Return a small object's or Range's contents, and other fields. Raises TooLargeError or RefusedError."""

        def once() -> dict[str, Any]:
            answer: dict[str, Any] = self._client.get_object(Bucket=self.target.bucket, Key=key, **parameters)
            self._check_whole("get_object", answer)
            # Not as a context manager: that gives out the stream below, which does not notice a cut.
            stream = answer["Body"]
            try:
                if answer["ContentLength"] > most:  # no more than this is read, whatever the server sends
                    raise TooLargeError(self.target, key, most)
                return {**answer, "Body": stream.read()}
            finally:
                stream.close()

        answer = self._retried("get_object", once, _NEVER)
        return answer["Body"], answer

    def _retried(self, method: str, once: Callable[[], dict[str, Any]], stop: threading.Event) -> dict[str, Any]:
        from botocore.exceptions import BotoCoreError, ClientError
        from botocore.parsers import ResponseParserError

        attempt = 0
        while True:
            attempt += 1
            try:
                return once()
            except (BotoCoreError, ClientError, ResponseParserError, ValueError) as error:
                if stop.is_set():
                    raise GivenUpError from error
                if attempt >= tries(method, error, self.options.attempts):
                    refused = explained(method, error, self.target)
                    refused.repeated = attempt > 1
                    raise refused from error
                wait = self._wait_s(attempt, error)
            if stop.wait(wait):
                raise GivenUpError

    def _check_whole(self, method: str, answer: dict[str, Any]) -> None:
        """Raise a connection error for a truncated response."""
        from botocore.exceptions import ConnectionClosedError

        some = _SOME_OF.get(method)
        if not _WHOLE.get(method, set()) <= answer.keys() or (some is not None and not some & answer.keys()):
            raise ConnectionClosedError(endpoint_url=str(self.target))

    def list(self, prefix: str) -> list[str]:
        """Return the keys under a prefix. Raises RefusedError."""
        found: list[str] = []
        marker: dict[str, str] = {}
        while True:
            answer = self.call("list_objects_v2", Prefix=prefix, **marker)
            found += [item["Key"] for item in answer.get("Contents", [])]
            if not answer.get("IsTruncated"):
                return found
            marker = {"ContinuationToken": answer["NextContinuationToken"]}

    def close(self) -> None:
        """Close connections."""
        self._client.close()

    def pause(self, attempt: int) -> None:
        """Wait as after a failed try."""
        _NEVER.wait(self._wait_s(attempt))

    def _wait_s(self, attempt: int, error: Exception | None = None) -> float:
        ours: float = min(self.options.first_wait_s * 2 ** min(attempt - 1, 30), self.options.longest_wait_s)
        return max(ours * random.uniform(0.5, 1.0), retry_after_s(error) if error else 0.0)


def _client(target: S3Target, options: S3Options) -> Any:
    import boto3
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError

    config = Config(
        retries={"mode": "standard", "total_max_attempts": 1},
        connect_timeout=options.connect_timeout_s,
        read_timeout=options.read_timeout_s,
        max_pool_connections=options.parallel_parts + 2,
        tcp_keepalive=True,
        s3={"addressing_style": options.addressing_style},
        # Checksums are given explicitly where the server keeps them; implicit ones break some servers.
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
    try:
        session = boto3.session.Session()
        found = session.get_credentials()
        if found is not None:
            # They may come from a file or a service, where no variable holds them.
            frozen = found.get_frozen_credentials()
            remember(frozen.secret_key, frozen.token)
            _require_clean(found.method, frozen)
        client = session.client("s3", region_name=options.region, endpoint_url=options.endpoint, config=config)
    except BotoCoreError as error:
        raise explained("", error, target) from error
    except ValueError as error:  # botocore says so about an endpoint that is no URL
        raise UsageError(redact(str(error)), remedy="correct the endpoint, e.g. https://host:9000") from error
    target.refuse_in(client.meta.endpoint_url)  # wherever boto3 has found it
    client.meta.events.register_last("before-call.s3", _expect_nothing)
    return client


def _require_clean(method: str, found: Any) -> None:
    """Refuse credentials with stray characters: they fail as headers, which looks like a lost line.

    Args:
        method: What boto3 calls the place where it has found them.
        found: The credentials.

    Raises:
        DeliveryError: They hold one.
    """
    for name in ("access_key", "secret_key", "token"):
        variable = {"access_key": "aws_access_key_id", "secret_key": "aws_secret_access_key"}.get(
            name, "aws_session_token"
        )
        source = variable.upper() if method == "env" else f"{variable} ({method})"
        require_clean(getattr(found, name) or "", source, DeliveryError)


def _expect_nothing(params: dict[str, Any], **_: object) -> None:
    """Send bodies at once: botocore 1.44 loops forever if the interim "100 Continue" breaks off."""
    params["headers"].pop("Expect", None)
