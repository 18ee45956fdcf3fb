"""Damaged files of a run folder: what a run can make again is set aside, the rest is refused in the first minute."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from job.data.prompts import PromptSets
from job.errors import DamagedError
from job.records import GeometryRecord, MeasuredFinalists, Record, State
from job.records.edit_path import EditPath
from job.search.finalists import FullCounts
from job.storage.atomic import read_record, sha256_file
from job.storage.events import read_events
from job.storage.exports import DONE, is_sealed
from job.storage.run_folder import RunFolder
from job.storage.study_file import require_restorable
from job.system.failpoints import reached


def repair(folder: RunFolder, say: Callable[[str], None]) -> None:
    """Set aside what is damaged and made again by this run. Raises DamagedError for anything else but the study."""
    export = folder.export_link.resolve()
    if fault := _fault_of_figures(folder, export):
        say(f"{fault}: {export.name} is exported and measured again")
        for subject in ("base", export.name):
            shutil.rmtree(folder.figures_file(subject), ignore_errors=True)  # no folder is replaced by a file
        (export / DONE).unlink(missing_ok=True)
        reached("repair:unsealed")
    made_again: tuple[tuple[Path, type[Record]], ...] = (
        (folder.state_file, State),
        (folder.rescored_file, FullCounts),
        (folder.finalists_file, MeasuredFinalists),
        (folder.geometry_file, GeometryRecord),
    )
    for file, kind in made_again:
        try:
            _read_if_there(file, kind)
        except DamagedError as error:
            aside = file.with_name(f"{file.name}.damaged")
            shutil.rmtree(aside, ignore_errors=True)  # a folder cannot be replaced
            file.replace(aside)
            reached("repair:aside")
            say(f"{error}: it is made again; the damaged one is now {aside.name}")
    _require_readable(folder)


def is_exported_whole(folder: RunFolder, export: Path) -> bool:
    """Return whether an export is complete and its figures are readable."""
    return is_sealed(export) and _fault_of_figures(folder, export) is None


def _fault_of_figures(folder: RunFolder, export: Path) -> DamagedError | None:
    try:
        for subject in ("base", export.name) if is_sealed(export) else ():
            folder.read_figures(subject)
    except DamagedError as error:
        return error
    return None


def require_usable(folder: RunFolder, *, mirrored: bool) -> None:
    """Read what a run goes on from and cannot make again. Raises DamagedError.

    A run of a `mirrored` job restores the study from the mirror.
    """
    _require_readable(folder)
    if not mirrored:
        require_restorable(folder.study_file)


def _require_readable(folder: RunFolder) -> None:
    folder.read_uploads()
    read_events(folder.events_file)
    _read_if_there(folder.prompts_file, PromptSets)
    _read_if_there(folder.path_file, EditPath)
    for file in folder.path.glob("directions/learned-*.safetensors"):
        if not file.is_file() or f"learned-{sha256_file(file)}" != file.stem:
            raise DamagedError(
                f"the learned directions {file} are damaged",
                remedy="restore the file from a copy or a checkpoint, or move the run folder away to start again",
            )


def _read_if_there(file: Path, kind: type[Record]) -> None:
    if file.exists():
        read_record(file, kind)
