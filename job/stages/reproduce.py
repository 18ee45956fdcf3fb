"""Reproduction of an export, compared with the original."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from job.errors import ExportMismatchError
from job.export.reproduction import Reproduction, environment_differences
from job.lifecycle.running import OpenJob
from job.records import Trial
from job.storage.atomic import read_record
from job.storage.exports import REPRODUCE


def original_of(job: OpenJob) -> Reproduction | None:
    """Return the export that a job reproduces, or None."""
    if job.record.reproduces is None:
        return None
    return read_record(job.folder.reproduces_file, Reproduction)


def trials_made(job: OpenJob, trials: Sequence[Trial]) -> int:
    """Return the number of trials in the search behind the exported trial."""
    original = original_of(job)
    return len(trials) if original is None else original.trials


def warn_of_differences(job: OpenJob) -> None:
    """Warn of versions that differ from the original's."""
    original = original_of(job)
    for line in environment_differences(original, job.record.versions) if original else ():
        job.events.say(f"warning: {line}: the result may differ from the original")


def require_original(job: OpenJob, export: Path) -> None:
    """Compare an export with its original, if there is one. Raises ExportMismatchError."""
    original = original_of(job)
    if original is None:
        return
    reproduced = read_record(export / REPRODUCE, Reproduction)
    if reproduced.edit != original.edit:
        raise ExportMismatchError(
            f"the search chose another edit (trial {reproduced.trial.number}, was {original.trial.number})",
            remedy="see the warnings on versions above",
        )
    differing = [name for name, sha in original.weights.items() if reproduced.weights.get(name) != sha]
    if differing:
        raise ExportMismatchError(
            f"{len(differing)} of {len(original.weights)} files of weights are not the original's: {differing[0]}",
            remedy="the same hardware and the versions named in reproduce.json give the same bytes",
        )
    job.events.emit("reproduced", f"all {len(original.weights)} files of weights equal the original's")
