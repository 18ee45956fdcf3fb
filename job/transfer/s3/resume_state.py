"""A delivery's records in the run folder: started uploads, and names not yet in a marker."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Set
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from job.records import Record
from job.storage.atomic import make_folder, write_atomically, write_record
from job.transfer.s3.objects import Algorithm


class UploadState(Record):
    """A started multipart upload, to resume or abort.

    Its parts are not recorded: the server knows them better.
    """

    VERBATIM = frozenset({"upload_id", "sha256"})
    version: Literal[1] = 1
    bucket: str
    key: str
    upload_id: str
    part_bytes: int
    algorithm: Algorithm
    sha256: str
    size: int


class UploadStates:
    """Started uploads to one target, a small file each."""

    def __init__(self, folder: Path, endpoint: str | None, bucket: str) -> None:
        """Use a folder, possibly shared with other targets."""
        self._folder = folder
        self._endpoint = endpoint
        self._bucket = bucket

    def _file(self, key: str) -> Path:
        name = hashlib.sha256(f"{self._endpoint}\n{self._bucket}\n{key}".encode()).hexdigest()
        return self._folder / f"part-{name[:24]}.json"

    def load(self, key: str) -> UploadState | None:
        """Return a key's started upload; an unreadable record counts as none, and its upload is aborted."""
        file = self._file(key)
        if not file.exists():
            return None
        try:
            return UploadState.model_validate_json(file.read_bytes())
        except ValidationError:
            return None

    def save(self, state: UploadState) -> None:
        """Record a started upload durably."""
        make_folder(self._folder)
        write_record(self._file(state.key), state)

    def forget(self, key: str) -> None:
        """Remove the record of a key's upload."""
        self._file(key).unlink(missing_ok=True)

    def all(self) -> Iterator[UploadState]:
        """Yield all uploads started to this server and bucket."""
        for file in sorted(self._folder.glob("part-*.json")):
            try:
                state = UploadState.model_validate_json(file.read_bytes())
            except ValidationError:
                continue
            if file == self._file(state.key):
                yield state


class TouchedNames:
    """Names under which a delivery in progress may have written objects.

    The replaced delivery's marker is gone by then; these names let leftovers be found.
    """

    def __init__(self, folder: Path, endpoint: str | None, target: str) -> None:
        name = hashlib.sha256(f"{endpoint}\n{target}".encode()).hexdigest()
        self._file = folder / f"touched-{name[:24]}.json"

    def names(self) -> set[str]:
        """Return the recorded names; empty without a delivery in progress."""
        return set(json.loads(self._file.read_text())) if self._file.exists() else set()

    def add(self, names: Set[str]) -> None:
        """Record names durably."""
        make_folder(self._file.parent)
        write_atomically(self._file, json.dumps(sorted(self.names() | names)).encode())

    def clear(self) -> None:
        """Remove all: the new marker lists the objects."""
        self._file.unlink(missing_ok=True)
