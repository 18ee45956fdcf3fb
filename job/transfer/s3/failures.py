"""Meaning of a failed request: whether a later try may succeed, and what to tell people."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from job.errors import DeliveryError, first_line
from job.text.redaction import redact
from job.transfer.s3.options import S3Target

# What an operation needs; a server that names the missing permission itself is believed first.
_PERMISSIONS = {
    "upload_part": "s3:PutObject",
    "create_multipart_upload": "s3:PutObject",
    "complete_multipart_upload": "s3:PutObject",
    "get_object": "s3:GetObject and s3:ListBucket",
    "head_object": "s3:GetObject and s3:ListBucket",
    "list_objects_v2": "s3:ListBucket",
    "list_parts": "s3:ListMultipartUploadParts",
    "list_multipart_uploads": "s3:ListBucketMultipartUploads",
}
_NAMED_PERMISSION = re.compile(r"not authorized to perform: ((?:s3|kms):\w+)")
# Besides 429 and 5xx. The first ones say that what was sent did not arrive whole, the last that an upload has to be
# begun anew.
_TRANSIENT_CODES = frozenset(
    {
        *("BadDigest", "IncompleteBody", "XAmzContentSHA256Mismatch", "RequestTimeout", "OperationAborted"),
        *("NoSuchUpload", "InvalidPart", "ConditionalRequestConflict"),
    }
)
_BAD_CREDENTIALS = frozenset({"InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidToken", "InvalidClientTokenId"})
_EXPIRED = frozenset({"ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired", "RequestExpired"})


class RefusedError(DeliveryError):
    """A request failed, after botocore's retries.

    Attributes:
        code: The server's code of the error, "" without an answer.
        status: The HTTP status, 0 without an answer.
        transient: Whether a later try may succeed.
        repeated: An earlier try failed, too: the server may have done what was requested, or may still be doing it.
    """

    def __init__(
        self,
        what: str,
        *,
        remedy: str,
        code: str = "",
        status: int = 0,
        transient: bool = False,
        repeated: bool = False,
    ) -> None:
        super().__init__(redact(what), remedy=f"{remedy} and run again: it continues")
        self.code, self.status, self.transient, self.repeated = code, status, transient, repeated

    @property
    def unsupported(self) -> bool:
        """Whether the server does not support something in the request."""
        return self.status in (400, 405, 501) and self.code not in _BAD_CREDENTIALS | _EXPIRED

    @property
    def missing(self) -> bool:
        """Whether the bucket is there, but not the object or upload."""
        return self.status == 404 and self.code != "NoSuchBucket"

    @property
    def conflicting(self) -> bool:
        """Whether a write met another, or an earlier try of its own."""
        return self.missing or self.status in (409, 412)


class TornAnswerError(RefusedError):
    """The line broke within an answer, which botocore does not notice."""

    def __init__(self, target: object) -> None:
        remedy = "check endpoint and network"
        super().__init__(f"{target}: an answer of the S3 server broke off", remedy=remedy, transient=True)


class TooLargeError(DeliveryError):
    """An object exceeds the limit for reading into memory."""

    def __init__(self, target: object, name: str, most: int) -> None:
        super().__init__(
            f"{target}: {name} has more than the {most} bytes that it may have",
            remedy="see who else can write there, and remove it",
        )


def damaged(source: Path) -> DeliveryError:
    """Return the error for a changed file of the export."""
    return DeliveryError(f"{source} is not what the manifest says", remedy="export again")


def conflict(target: S3Target, name: str) -> DeliveryError:
    """Return the error for an object written by someone else meanwhile."""
    said = f"{target}: something else wrote {target.key(name)} during the upload"
    return DeliveryError(said, remedy="let only one job deliver there")


@contextmanager
def explained(method: str, target: object) -> Iterator[None]:
    """Turn botocore's errors into a RefusedError, without keys and signatures."""
    from botocore.exceptions import BotoCoreError, ClientError
    from botocore.parsers import ResponseParserError

    try:
        yield
    except ClientError as error:
        raise _refused(method, error.response, target) from error
    except BotoCoreError as error:
        raise _unanswered(error, target) from error
    except (ResponseParserError, ValueError) as error:  # half a document, or half a date in a header
        raise TornAnswerError(target) from error


def _refused(method: str, response: dict[str, Any], target: object) -> RefusedError:
    metadata, described = response.get("ResponseMetadata", {}), response.get("Error", {})
    code, message, status = str(described.get("Code")), described.get("Message"), int(metadata.get("HTTPStatusCode", 0))
    transient = status == 429 or (status >= 500 and status != 501) or code in _TRANSIENT_CODES
    what, remedy = f"the server refused {method}: {code} {message} (HTTP {status})", "correct it"
    if code in _BAD_CREDENTIALS:
        what = f"the S3 server does not accept the credentials ({code})"
        remedy = "check the access key and its secret (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY or AWS_PROFILE)"
    elif code in _EXPIRED:
        what, remedy = f"the S3 credentials have expired ({code})", "renew them"
    elif code == "RequestTimeTooSkewed":
        what, remedy = "this machine's clock is wrong", "set the clock"
    elif code == "NoSuchBucket":
        what, remedy = "there is no such bucket", "create it or correct the target"
    elif status in (401, 403):
        named = _NAMED_PERMISSION.search(str(message))
        usual = "s3:" + "".join(word.title() for word in method.split("_"))
        what = f"not allowed: {named[1] if named else _PERMISSIONS.get(method, usual)} ({code})"
        remedy = "grant it to these credentials"
    elif transient:
        what, remedy = f"the S3 server kept failing: {code} (HTTP {status})", "wait until it works"
    repeated = metadata.get("RetryAttempts", 0) > 0
    return RefusedError(
        f"{target}: {what}", remedy=remedy, code=code, status=status, transient=transient, repeated=repeated
    )


def _unanswered(error: Exception, target: object) -> RefusedError:
    from botocore import exceptions as known

    line = (known.HTTPClientError, known.ConnectionError, known.MetadataRetrievalError, known.CredentialRetrievalError)
    transient = isinstance(error, line) and "CERTIFICATE_VERIFY_FAILED" not in str(error)
    if isinstance(error, known.NoCredentialsError | known.PartialCredentialsError):
        what, remedy = "there are no S3 credentials", "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or AWS_PROFILE"
    elif transient:
        what, remedy = f"the S3 server cannot be reached ({type(error).__name__})", "check endpoint and network"
    else:
        what, remedy = first_line(error), "correct it"
    return RefusedError(f"{target}: {what}", remedy=remedy, transient=transient)
