"""job.json: the only writer of a job's record during a run."""

from __future__ import annotations

from typing import Any

from job.records import JobRecord
from job.storage.atomic import write_record
from job.storage.run_folder import RunFolder


class JobFile:
    """A job's record and its file."""

    def __init__(self, folder: RunFolder, record: JobRecord | None = None) -> None:
        """Take a record, by default the run folder's. Raises JobError if it cannot be read."""
        self._path = folder.job_file
        self.record = folder.read_job() if record is None else record

    def write(self) -> None:
        """Write the record. Raises MachineError."""
        write_record(self._path, self.record)

    def pin(self, **resolved: Any) -> None:
        """Store resolved values, so that no later start resolves them again. Raises MachineError."""
        self.record = self.record.model_copy(update=resolved)
        self.write()
