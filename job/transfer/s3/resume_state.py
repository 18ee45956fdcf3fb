"""What a delivery notes in the run folder: begun uploads, and names that no marker lists any more."""

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
    """A multipart upload that has been begun: enough to go on with it, or to abort it.

    The parts themselves are not noted: the server knows better which of them it has.
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
    """The begun uploads to one target, a small file each."""

    def __init__(self, folder: Path, endpoint: str | None, bucket: str) -> None:
        """Use a folder that may hold the states of other targets, too."""
        self._folder = folder
        self._endpoint = endpoint
        self._bucket = bucket

    def _file(self, key: str) -> Path:
        name = hashlib.sha256(f"{self._endpoint}\n{self._bucket}\n{key}".encode()).hexdigest()
        return self._folder / f"part-{name[:24]}.json"

    def load(self, key: str) -> UploadState | None:
        """Return the upload begun for a key; an unreadable state is none, its upload gets aborted as abandoned."""
        file = self._file(key)
        if not file.exists():
            return None
        try:
            return UploadState.model_validate_json(file.read_bytes())
        except ValidationError:
            return None

    def save(self, state: UploadState) -> None:
        """Note a begun upload, durably."""
        make_folder(self._folder)
        write_record(self._file(state.key), state)

    def forget(self, key: str) -> None:
        """Note that a key's upload is over."""
        self._file(key).unlink(missing_ok=True)

    def all(self) -> Iterator[UploadState]:
        """Yield all uploads begun to this server and bucket."""
        for file in sorted(self._folder.glob("part-*.json")):
            try:
                state = UploadState.model_validate_json(file.read_bytes())
            except ValidationError:
                continue
            if file == self._file(state.key):
                yield state


class TouchedNames:
    """The names under which a delivery in progress has, or may have, put objects or is replacing them.

    The marker of the replaced delivery is gone by then, and without this nobody would remember what is left of it.
    """

    def __init__(self, folder: Path, endpoint: str | None, target: str) -> None:
        name = hashlib.sha256(f"{endpoint}\n{target}".encode()).hexdigest()
        self._file = folder / f"touched-{name[:24]}.json"

    def names(self) -> set[str]:
        """Return the noted names; none when no delivery is in progress."""
        return set(json.loads(self._file.read_text())) if self._file.exists() else set()

    def add(self, names: Set[str]) -> None:
        """Note names, durably."""
        make_folder(self._file.parent)
        write_atomically(self._file, json.dumps(sorted(self.names() | names)).encode())

    def clear(self) -> None:
        """Forget them all: a marker lists what there is."""
        self._file.unlink(missing_ok=True)
