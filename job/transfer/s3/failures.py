"""Meaning of a failed request: whether to retry, and what to tell people."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

from job.errors import DeliveryError
from job.text.redaction import redact

# A server may ask for more patience than our own waits have, but not for an unbounded one.
_LONGEST_RETRY_AFTER_S = 300.0
# What an operation needs; a server that names the missing permission itself is believed first.
_PERMISSIONS = {
    "put_object": "s3:PutObject",
    "create_multipart_upload": "s3:PutObject",
    "upload_part": "s3:PutObject",
    "complete_multipart_upload": "s3:PutObject",
    "get_object": "s3:GetObject and s3:ListBucket",
    "head_object": "s3:GetObject and s3:ListBucket",
    "delete_object": "s3:DeleteObject",
    "abort_multipart_upload": "s3:AbortMultipartUpload",
    "list_objects_v2": "s3:ListBucket",
    "list_parts": "s3:ListMultipartUploadParts",
    "list_multipart_uploads": "s3:ListBucketMultipartUploads",
}
_NAMED_PERMISSION = re.compile(r"not authorized to perform: ((?:s3|kms):\w+)")
_TRANSIENT_CODES = frozenset(
    {
        "SlowDown",
        "RequestTimeout",
        "RequestTimeoutException",
        "Throttling",
        "ThrottlingException",
        "TooManyRequests",
        "RequestLimitExceeded",
        "OperationAborted",
        "InternalError",
        "ServiceUnavailable",
        # The line changed or cut what was sent; the file itself has been compared with the manifest.
        "BadDigest",
        "IncompleteBody",
        "XAmzContentSHA256Mismatch",
    }
)
# How often a request is made whose refusal has lost its words: on the line, or because something in between refuses.
_TRIES_WITHOUT_WORDS = 3
_BAD_CREDENTIALS = frozenset({"InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidToken", "InvalidClientTokenId"})
_EXPIRED = frozenset({"ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired", "RequestExpired"})


class RefusedError(DeliveryError):
    """A request failed for good.

    Attributes:
        code: The server's code of the error, "" where there was no answer.
        status: The HTTP status, 0 where there was no answer.
        repeated: An earlier try failed, too: the server may have done what it asked for, or may still be at it.
    """

    def __init__(self, what: str, *, remedy: str = "", code: str = "", status: int = 0) -> None:
        super().__init__(what, remedy=remedy)
        self.code = code
        self.status = status
        self.repeated = False

    @property
    def unsupported(self) -> bool:
        """Whether the server does not support something in the request."""
        return self.status in (400, 405, 501) and self.code not in _BAD_CREDENTIALS | _EXPIRED

    @property
    def transient(self) -> bool:
        """Whether a later retry might succeed."""
        return self.code in _TRANSIENT_CODES or self.status == 429 or (self.status >= 500 and self.status != 501)


class TooLargeError(DeliveryError):
    """An object exceeds the limit for reading into memory."""

    def __init__(self, target: object, key: str, most: int) -> None:
        super().__init__(
            f"{target}: {key} has more than the {most} bytes that it may have",
            remedy="see who else can write there, and remove it",
        )


class GivenUpError(Exception):
    """A request was stopped because the upload ends. Internal."""


def damaged(source: Path) -> DeliveryError:
    """Return the error for a changed file of the export."""
    return DeliveryError(f"{source} is not what the manifest says", remedy="export again")


def conflict(target: object, key: str) -> DeliveryError:
    """Return the error for an object written by someone else meanwhile."""
    return DeliveryError(
        f"{target}: something else wrote {key} during the upload", remedy="let only one job deliver there"
    )


def _answer(error: Exception) -> tuple[str, int, Mapping[str, str], str]:
    """Return code, HTTP status, headers and message of a server's error answer; empty without one."""
    response: Mapping[str, Any] = getattr(error, "response", None) or {}
    described = response.get("Error", {})
    metadata = response.get("ResponseMetadata", {})
    code, message = str(described.get("Code", "")), str(described.get("Message", ""))
    return code, int(metadata.get("HTTPStatusCode", 0)), metadata.get("HTTPHeaders", {}), message


def may_pass(method: str, error: Exception) -> bool:
    """Return whether a retry may succeed."""
    from botocore import exceptions as known
    from botocore.parsers import ResponseParserError

    if isinstance(error, known.ClientError):
        code, status, _, _ = _answer(error)
        # A completion that loses such a race has to be made anew, a plain put has only to be repeated.
        conflict = code == "ConditionalRequestConflict" and method == "put_object"
        return code in _TRANSIENT_CODES or status == 429 or (status >= 500 and status != 501) or conflict
    if isinstance(error, known.SSLError):
        return "CERTIFICATE_VERIFY_FAILED" not in str(error)
    lost_line = (
        known.HTTPClientError,
        known.ConnectionError,
        known.IncompleteReadError,
        known.MetadataRetrievalError,
        known.CredentialRetrievalError,
        # Of an answer that the line has cut: it is no XML any more, or half a date or number in a header.
        ResponseParserError,
        ValueError,
    )
    return isinstance(error, lost_line)


def tries(method: str, error: Exception, most: int) -> int:
    """Return the number of tries for a failure."""
    if may_pass(method, error):
        return most
    code, status, _, _ = _answer(error)
    # botocore names a refusal after its status where the body is cut off; answers to HEAD never have one.
    return min(most, _TRIES_WITHOUT_WORDS) if code == str(status) and method != "head_object" else 1


def retry_after_s(error: Exception) -> float:
    """Return the seconds to wait requested by the server, or 0."""
    value = _answer(error)[2].get("retry-after", "")
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(value).timestamp() - time.time()
        except ValueError:
            return 0.0
    return min(max(seconds, 0.0), _LONGEST_RETRY_AFTER_S) if math.isfinite(seconds) else 0.0


def explained(method: str, error: Exception, target: object) -> RefusedError:
    """Return a clear error and remedy, without keys and signatures."""
    code, status, _, message = _answer(error)
    if not status:
        return _explained_without_answer(error, target)
    what, remedy = f"{target}: the server refused {method}: {code} {message} (HTTP {status})", "correct it"
    if code in _BAD_CREDENTIALS:
        what = f"{target}: the S3 server does not accept the credentials ({code})"
        remedy = "check the access key and its secret (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY or AWS_PROFILE)"
    elif code in _EXPIRED:
        what, remedy = f"{target}: the S3 credentials have expired ({code})", "renew them"
    elif code == "RequestTimeTooSkewed":
        what, remedy = f"{target}: this machine's clock is wrong", "set the clock"
    elif code == "NoSuchBucket":
        what, remedy = f"{target}: there is no such bucket", "create it or correct the target"
    elif status in (401, 403):
        named = _NAMED_PERMISSION.search(message)
        permission = named.group(1) if named else _PERMISSIONS.get(method, method)
        what, remedy = f"{target}: not allowed: {permission} ({code})", "grant it to these credentials"
    elif status == 429 or status >= 500 or code in _TRANSIENT_CODES:
        what, remedy = f"{target}: the S3 server kept failing: {code} (HTTP {status})", "wait until it works"
    return RefusedError(redact(what), remedy=f"{remedy} and run again: it continues", code=code, status=status)


def _explained_without_answer(error: Exception, target: object) -> RefusedError:
    from botocore import exceptions as known

    if isinstance(error, known.NoCredentialsError | known.PartialCredentialsError):
        what, remedy = "there are no S3 credentials", "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or AWS_PROFILE"
    elif may_pass("", error):
        what, remedy = f"the S3 server cannot be reached ({type(error).__name__})", "check endpoint and network"
    else:
        what, remedy = str(error).splitlines()[0], "correct it"
    return RefusedError(redact(f"{target}: {what}"), remedy=f"{remedy} and run again: it continues")
