"""A delivery's record in the run folder: started uploads, and names not yet in a marker."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from job.records import Record
from job.storage.atomic import make_folder, write_record
from job.transfer.s3.objects import Algorithm


class UploadState(Record):
    """A started multipart upload. Its parts are not recorded: the server knows them better."""

    upload_id: str
    part_bytes: int
    algorithm: Algorithm
    sha256: str
    size: int


class ResumeState(Record):
    """What a delivery has begun.

    Attributes:
        uploads: Started uploads by name.
        touched: Names under which objects may have been written. The replaced delivery's marker is gone by then.
    """

    VERBATIM = frozenset({"uploads", "touched"})
    version: Literal[1] = 1
    uploads: dict[str, UploadState] = Field(default_factory=dict)
    touched: frozenset[str] = frozenset()


class ResumeFile:
    """The record of one target, kept in a file or, without one, in memory."""

    def __init__(self, file: Path | None = None) -> None:
        self._file, self.state = file, ResumeState()
        try:
            if file is not None:
                self.state = ResumeState.model_validate_json(file.read_bytes())
        except (FileNotFoundError, ValueError):
            return  # uploads of an unreadable record are aborted where the server lists them

    def change(self, **fields: Any) -> None:
        """Replace fields durably."""
        self.state = self.state.model_copy(update=fields)
        if self._file is not None:
            make_folder(self._file.parent)
            write_record(self._file, self.state)

    def begin(self, name: str, upload: UploadState) -> None:
        """Record a started upload durably."""
        self.change(uploads={**self.state.uploads, name: upload})

    def forget(self, name: str) -> None:
        """Remove the record of an upload."""
        self.change(uploads={other: upload for other, upload in self.state.uploads.items() if other != name})

    def clear(self) -> None:
        """Remove all: the new marker lists the objects."""
        self.state = ResumeState()
        if self._file is not None:
            self._file.unlink(missing_ok=True)
