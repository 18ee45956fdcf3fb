"""Inputs of preflight: settings, machine, and state of earlier starts."""

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
    """State of earlier starts; `processes` are theirs, and may be alive.

    Attributes:
        trials_wanted: How many trials the search makes; None before the first start.
        path_found: The search's edits by gradient are known, or it began without any.
    """

    prompts: PromptSets | None = None
    commit: str | None = None
    date: str | None = None
    starts: tuple[PastStart, ...] = ()
    processes: tuple[ProcessRecord, ...] = ()
    trials_done: int = 0
    trials_wanted: int | None = None
    path_found: bool = False


@dataclass(frozen=True)
class JobHolder:
    """Another run that holds the job: its description, and the remedy."""

    name: str
    remedy: str = "wait for it to end or stop it"


@dataclass(frozen=True)
class PreflightInputs:
    """All inputs of preflight.

    Attributes:
        on: The machine to plan for; None: this one.
        settings_key: Distinguishes these settings from past starts'.
        lease: Job whose lease at the checkpoint is checked; None if this run holds it.
        rental: This rented machine, None if not rented or unknown.
        undelivered: Another job that keeps the machine from being ended, or "".
        upload_state: Folder that caches targets' capabilities, or None.
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
