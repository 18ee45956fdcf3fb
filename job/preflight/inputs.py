"""What preflight works on: the settings, the machine, and what earlier starts of the job left."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from job.config.schema import Settings
from job.data.prompts import PromptSets
from job.preflight.readings import MachineReading
from job.preflight.restarts import PastStart
from job.system.processes import ProcessRecord

if TYPE_CHECKING:
    from job.cloud.self_stop import Rental


@dataclass(frozen=True)
class EarlierStarts:
    """What earlier starts of the job left.

    Attributes:
        prompts: The prompts, None if no start has read them.
        commit: The commit that the model is pinned to, None if it is not pinned yet.
        date: The date on which all prompts are written, None for today.
        starts: The past starts, the latest last.
        processes: Processes of earlier starts that may still be alive.
        trials_done: Finished trials of the study.
    """

    prompts: PromptSets | None = None
    commit: str | None = None
    date: str | None = None
    starts: tuple[PastStart, ...] = ()
    processes: tuple[ProcessRecord, ...] = ()
    trials_done: int = 0


@dataclass(frozen=True)
class JobHolder:
    """Another run that holds the job.

    Attributes:
        name: Who it is, for people.
        remedy: What to do about it.
    """

    name: str
    remedy: str = "wait for it to end or stop it"


@dataclass(frozen=True)
class PreflightInputs:
    """Everything that preflight depends on.

    Attributes:
        settings: The job's settings.
        notes: What became of old settings.
        on: The machine to plan for; None: this one.
        settings_key: Tells these settings from those of past starts.
        earlier: What earlier starts left.
        holder: The run that holds the job's lock, None if no other does.
        lease: Job whose lease at the checkpoint is checked; None if this run holds it.
        rental: The rented machine that this is, None if it is not rented or not known.
        undelivered: Which other job of the workspace keeps the machine from being ended, "" if none does.
        upload_state: Folder that remembers how targets behave; None: nothing is remembered.
        keep_downloads: Keep downloaded files in the caches.
        report: Told of retries.
        clock: Returns seconds.
        sleep: Waits for a number of seconds.
    """

    settings: Settings
    notes: tuple[str, ...] = ()
    on: MachineReading | None = None
    settings_key: str = ""
    earlier: EarlierStarts = EarlierStarts()
    holder: JobHolder | None = None
    lease: str | None = None
    rental: Rental | None = None
    undelivered: str = ""
    upload_state: Path | None = None
    keep_downloads: bool = True
    report: Callable[[str], None] = lambda _: None
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep
