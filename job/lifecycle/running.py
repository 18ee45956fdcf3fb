"""A job in progress."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from job.config.schema import Settings
from job.lifecycle.lock import JobLock
from job.records import JobRecord, Resolution, Trial
from job.search.budget import Meter
from job.search.method import trials_wanted
from job.storage.atomic import write_record
from job.storage.events import Events
from job.storage.job_file import JobFile
from job.storage.run_folder import RunFolder
from job.system.failpoints import reached
from job.system.signals import StopSignals
from job.text.behaviour import BehaviourWords, words_of
from job.text.refusal_markers import RefusalMarkers


@dataclass(frozen=True)
class OpenJob:
    """A job with its run folder, job.json, settings of this start and events."""

    folder: RunFolder
    file: JobFile
    settings: Settings
    events: Events

    @property
    def record(self) -> JobRecord:
        """The current job.json."""
        return self.file.record

    @property
    def resolution(self) -> Resolution:
        """What the first start resolved; set once a model has been loaded."""
        resolution = self.record.resolution
        assert resolution is not None
        return resolution

    @property
    def words(self) -> BehaviourWords:
        """The behaviour in words."""
        return words_of(self.settings.card.behaviour)

    @property
    def markers(self) -> RefusalMarkers:
        """The markers of refusals, by the rules that the job began with."""
        rules = self.resolution
        return RefusalMarkers(
            self.settings.scoring.refusal_markers,
            topic_words=bool(rules.topic_words),
            evasions=bool(rules.evasions),
        )

    @property
    def trials_wanted(self) -> int:
        """Trials that the search makes, or is expected to while its path is not known. Raises DamagedError."""
        return trials_wanted(self.folder, self.settings.trials, self.settings.search.asked_method)

    def export_of(self, trial: Trial) -> Path:
        """Return a trial's export folder in the job's format."""
        return self.folder.export_folder(trial.number, self.settings.export_format)


@dataclass(frozen=True)
class RunningJob(OpenJob):
    """A job held by this process, with its stop signals, meter and lock."""

    signals: StopSignals
    meter: Meter
    lock: JobLock

    def begin(self, stage: str) -> None:
        """Record the start of a stage in state.json and at the checkpoint."""
        state = self.folder.read_state()
        assert state is not None
        write_record(self.folder.state_file, state.model_copy(update={"phase": stage}))
        self.events.emit("phase", name=stage)
        reached(f"stage:{stage}")
        if self.folder.prompts_file.exists():  # before, there is nothing to continue elsewhere
            self.lock.keep()
