"""A job that a process works on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from job.config.schema import Settings
from job.lifecycle.lock import JobLock
from job.records import JobRecord, Resolution, Trial
from job.search.budget import Meter
from job.storage.atomic import write_record
from job.storage.events import Events
from job.storage.job_file import JobFile
from job.storage.run_folder import RunFolder
from job.system.failpoints import reached
from job.system.signals import StopSignals


@dataclass(frozen=True)
class OpenJob:
    """A job whose run folder is there.

    Attributes:
        folder: The run folder.
        file: Its job.json.
        settings: The settings of this start.
        events: Where progress goes.
    """

    folder: RunFolder
    file: JobFile
    settings: Settings
    events: Events

    @property
    def record(self) -> JobRecord:
        """job.json as it stands."""
        return self.file.record

    @property
    def resolution(self) -> Resolution:
        """What the job's first start resolved; only once a model has been loaded."""
        resolution = self.record.resolution
        assert resolution is not None
        return resolution

    def export_of(self, trial: Trial) -> Path:
        """Return the folder of a trial's export in the job's format."""
        return self.folder.export_folder(trial.number, self.settings.export_format)


@dataclass(frozen=True)
class RunningJob(OpenJob):
    """A job that this process holds.

    Attributes:
        signals: What stops the run.
        meter: Counts time and money.
        lock: The lock, here and at the mirror.
    """

    signals: StopSignals
    meter: Meter
    lock: JobLock

    def begin(self, stage: str) -> None:
        """Write down that a stage begins, for status and for those who continue elsewhere."""
        state = self.folder.read_state()
        assert state is not None
        write_record(self.folder.state_file, state.model_copy(update={"phase": stage}))
        self.events.emit("phase", name=stage)
        reached(f"stage:{stage}")
        if self.folder.prompts_file.exists():  # before, there is nothing that another machine could go on from
            self.lock.keep()
