"""The outcome of a run, and whether a job is complete."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from job.config.schema import Settings
from job.data.prompts import PromptSets
from job.errors import DamagedError
from job.export.reproduction import Reproduction
from job.records import Figures, State
from job.search.method import trials_wanted
from job.storage.atomic import read_record
from job.storage.exports import REPRODUCE, is_sealed
from job.storage.run_folder import RunFolder
from job.text.behaviour import words_of
from job.text.redaction import redact


@dataclass(frozen=True)
class Outcome:
    """The outcome of a run.

    Attributes:
        chosen: The exported trial's number.
        missed_gate: The gate that prevented delivery, or None.
    """

    folder: RunFolder
    chosen: int
    base: Figures
    edited: Figures
    report_prompts: str
    failed_targets: tuple[tuple[str, str], ...] = ()
    missed_gate: str | None = None


def completed(folder: RunFolder, settings: Settings) -> Outcome | None:
    """Return a job's outcome if nothing is left to do, else None, also if that cannot be read."""
    try:
        finish = _finish(folder)
        if finish is None or _left(folder, settings, *finish):
            return None
        outcome = outcome_of(folder, finish[1], folder.export_folder(finish[1], settings.export_format))
        return None if missed_gate(settings, outcome.edited) else outcome
    except DamagedError:
        return None


def left_to_do(folder: RunFolder, settings: Settings) -> str:
    """Return what a finished job still has to do, "" without anything, for another job or if it cannot be read."""
    try:
        finish = _finish(folder)
        return _left(folder, settings, *finish) if finish is not None else ""
    except DamagedError:
        return ""


def _finish(folder: RunFolder) -> tuple[State, int] | None:
    """Return a finished job's state and chosen trial."""
    state = folder.read_state()
    if state is None or state.state != "finished" or state.chosen is None:
        return None
    return state, state.chosen


def _left(folder: RunFolder, settings: Settings, state: State, chosen: int) -> str:
    wanted = trials_wanted(folder, settings.trials, settings.search.asked_method)
    if state.trials < wanted and not _is_spent(state, settings):
        return f"the search continues from {state.trials} to {wanted} trials"
    export = folder.export_folder(chosen, settings.export_format)
    delivered = {item.target for item in folder.read_uploads() if item.state == "done" and item.export == export.name}
    missing = [target for target in map(redact, settings.upload) if target not in delivered]
    there = is_sealed(export)
    # Deliveries need no local files: the machine that made them may be gone.
    if there or (settings.upload and settings.checkpoint is not None and not missing):
        if missing:
            return f"trial {chosen} will be delivered to {', '.join(missing)}"
        return _outdated(folder, state, export) if there else ""
    form = "" if settings.export_format == "merged" else f" in the format {settings.export_format}"
    return f"trial {chosen} will be exported{form}, because this workspace does not have that export"


def _outdated(folder: RunFolder, state: State, export: Path) -> str:
    """Return what an export lacks that was made before the search was extended in another workspace."""
    try:
        made = read_record(export / REPRODUCE, Reproduction).trials
    except DamagedError:
        return ""  # as it was delivered; a new export is not what is missing
    if made >= state.trials or folder.reproduces_file.exists():
        return ""
    return f"its export was made after {made} trials, and its card will state all {state.trials}"


def _is_spent(state: State, settings: Settings) -> bool:
    limits = ((state.max_hours, settings.max_hours), (state.max_cost, settings.max_cost))
    return any(before is not None and now is not None and now <= before for before, now in limits)


def missed_gate(settings: Settings, figures: Figures) -> str | None:
    """Return the gate that an export's metrics miss, or None."""
    failed = figures.failed
    if settings.max_refusals is not None and failed > settings.max_refusals:
        broken = "" if failed == figures.refusals else " or have a broken response"
        are = words_of(settings.card.behaviour).are
        return f"{failed} of {figures.bad_prompts} {are}{broken}, max_refusals is {settings.max_refusals}"
    if settings.max_kl is not None and (figures.kl is None or not figures.kl <= settings.max_kl):
        found = "was not measured" if figures.kl is None else f"is {figures.kl:.4g}"
        return f"the KL divergence {found}, max_kl is {settings.max_kl:g}"
    return None


def outcome_of(folder: RunFolder, chosen: int, export: Path) -> Outcome:
    """Read an export's outcome from the run folder."""
    base, edited = folder.read_figures("base"), folder.read_figures(export.name)
    return Outcome(folder, chosen, base, edited, read_record(folder.prompts_file, PromptSets).report_description)
