"""job.json: what was asked for and what has been resolved; this is all that writes it in a run."""

from __future__ import annotations

from typing import Any

from job.records import JobRecord
from job.storage.atomic import write_record
from job.storage.run_folder import RunFolder


class JobFile:
    """The record of a job and its file.

    Attributes:
        record: The record as it stands.
    """

    def __init__(self, folder: RunFolder, record: JobRecord | None = None) -> None:
        """Take a record, by default that in the run folder.

        Raises:
            JobError: The file cannot be read.
        """
        self._path = folder.job_file
        self.record = folder.read_job() if record is None else record

    def write(self) -> None:
        """Write the record as it stands.

        Raises:
            MachineError: The file cannot be written here.
        """
        write_record(self._path, self.record)

    def pin(self, **resolved: Any) -> None:
        """Keep what was resolved, so that no later start resolves it again.

        Raises:
            MachineError: The file cannot be written here.
        """
        self.record = self.record.model_copy(update=resolved)
        self.write()
