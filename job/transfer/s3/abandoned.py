"""Abort abandoned multipart uploads, whose parts cost money."""

from __future__ import annotations

from collections.abc import Set

from job.transfer.s3.client import S3Client
from job.transfer.s3.failures import RefusedError
from job.transfer.s3.resume_state import UploadStates


def abort_noted(store: S3Client, states: UploadStates, *, keep: Set[str]) -> int:
    """Abort the uploads recorded in the run folder, except under the keys to keep; return their number."""
    done = 0
    for state in states.all():
        if state.key not in keep and abort(store, state.key, state.upload_id):
            states.forget(state.key)
            done += 1
    return done


def abort_listed(store: S3Client, states: UploadStates, keys: Set[str]) -> int:
    """Abort unrecorded uploads that the server lists under these keys; return their number."""
    noted = {state.upload_id for state in states.all()}
    found = [(key, upload) for key, upload in listed(store, store.target.key("")) if key in keys]
    return sum(abort(store, key, upload) for key, upload in found if upload not in noted)


def abort(store: S3Client, key: str, upload_id: str) -> bool:
    """Abort an upload; return whether it is gone. Missing permission is no failure."""
    try:
        store.call("abort_multipart_upload", Key=key, UploadId=upload_id)
    except RefusedError as error:
        return error.code == "NoSuchUpload" or error.status == 404
    return True


def listed(store: S3Client, prefix: str) -> list[tuple[str, str]]:
    """Return key and id of all uploads under a prefix. Raises RefusedError."""
    found: dict[tuple[str, str], None] = {}
    marker: dict[str, str] = {}
    while True:
        answer = store.call("list_multipart_uploads", Prefix=prefix, **marker)
        page = [(item["Key"], item["UploadId"]) for item in answer.get("Uploads", [])]
        news = [item for item in page if item not in found]
        found.update(dict.fromkeys(news))
        # Some servers take no notice of the markers: a page without news ends it, too.
        if not answer.get("IsTruncated") or not news:
            return list(found)
        marker = {"KeyMarker": answer["NextKeyMarker"], "UploadIdMarker": answer["NextUploadIdMarker"]}
