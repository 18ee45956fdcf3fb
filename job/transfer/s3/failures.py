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
    **dict.fromkeys(("upload_part", "create_multipart_upload", "complete_multipart_upload"), "s3:PutObject"),
    **dict.fromkeys(("get_object", "head_object"), "s3:GetObject and s3:ListBucket"),
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
_KEYS = "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or AWS_PROFILE"
_REJECTED = ("the S3 server does not accept the credentials ({code})", f"check the access key and its secret ({_KEYS})")
_EXPIRED = ("the S3 credentials have expired ({code})", "renew them")
# Codes whose cause is known: what it is, and the remedy.
_CAUSES = {
    **dict.fromkeys(("InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidToken", "InvalidClientTokenId"), _REJECTED),
    **dict.fromkeys(("ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired", "RequestExpired"), _EXPIRED),
    "RequestTimeTooSkewed": ("this machine's clock is wrong", "set the clock"),
    "NoSuchBucket": ("there is no such bucket", "create it or correct the target"),
}


class RefusedError(DeliveryError):
    """A request failed, after botocore's retries.

    Attributes:
        code: The server's code of the error, "" without an answer.
        status: The HTTP status, 0 without an answer.
        transient: Whether a later try may succeed.
    """

    def __init__(self, what: str, *, remedy: str, code: str = "", status: int = 0, transient: bool = False) -> None:
        super().__init__(redact(what), remedy=f"{remedy} and run again: it continues")
        self.code, self.status, self.transient = code, status, transient

    @property
    def unsupported(self) -> bool:
        """Whether the server does not support something in the request."""
        return self.status in (400, 405, 501) and self.code not in _CAUSES

    @property
    def missing(self) -> bool:
        """Whether the bucket is there, but not the object or upload."""
        return self.status == 404 and self.code != "NoSuchBucket"

    @property
    def conflicting(self) -> bool:
        """Whether a write met another, or an earlier try of its own."""
        return self.missing or self.status in (409, 412)


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
    from botocore import exceptions as botocore
    from botocore.parsers import ResponseParserError

    line = (
        *(botocore.HTTPClientError, botocore.ConnectionError, botocore.IncompleteReadError),
        *(botocore.MetadataRetrievalError, botocore.CredentialRetrievalError),
        *(ResponseParserError, ValueError, KeyError),  # half a document, half a date in a header, a missing header
    )
    try:
        yield
    except botocore.ClientError as error:
        raise _refused(method, error.response, target) from error
    except (botocore.NoCredentialsError, botocore.PartialCredentialsError) as error:
        raise RefusedError(f"{target}: there are no S3 credentials", remedy=f"set {_KEYS}") from error
    except (botocore.BotoCoreError, *line) as error:
        if isinstance(error, line) and "CERTIFICATE_VERIFY_FAILED" not in str(error):
            what = f"the S3 server cannot be reached ({type(error).__name__})"
            raise RefusedError(f"{target}: {what}", remedy="check endpoint and network", transient=True) from error
        raise RefusedError(f"{target}: {first_line(error)}", remedy="correct it") from error


def _refused(method: str, response: dict[str, Any], target: object) -> RefusedError:
    details = response.get("Error", {})
    code, message = str(details.get("Code")), str(details.get("Message"))
    status = int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    transient = status == 429 or (status >= 500 and status != 501) or code in _TRANSIENT_CODES
    if code in _CAUSES:
        what, remedy = _CAUSES[code]
        what = what.format(code=code)
    elif status in (401, 403):
        named = _NAMED_PERMISSION.search(message)
        usual = "s3:" + "".join(word.title() for word in method.split("_"))
        what = f"not allowed: {named[1] if named else _PERMISSIONS.get(method, usual)} ({code})"
        remedy = "grant it to these credentials"
    elif transient:
        what, remedy = f"the S3 server kept failing: {code} (HTTP {status})", "wait until it works"
    else:
        what, remedy = f"the server refused {method}: {code} {message} (HTTP {status})", "correct it"
    return RefusedError(f"{target}: {what}", remedy=remedy, code=code, status=status, transient=transient)
