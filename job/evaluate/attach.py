"""Keep a trial's benchmark scores where its card and reports find them."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Sequence
from pathlib import Path

from job.errors import HeldError
from job.export.merged import seal_made
from job.export.reproduction import Reproduction
from job.records import FORMATS
from job.records.evaluation import Benchmarks, Score
from job.report.markdown import write_reports
from job.storage.atomic import ensure_folder, read_record, write_record
from job.storage.exports import DONE, REPRODUCE, is_sealed
from job.storage.run_folder import RunFolder


def attach_benchmarks(
    folder: RunFolder, trial: int, scores: Sequence[Score], source: Path, say: Callable[[str], None]
) -> None:
    """Store a trial's scores and renew the cards of its exports and the reports; `source` is the base model's folder.

    They replace earlier scores of the same tasks, and all of another version of lm-eval. Raises DamagedError or
    MachineError.
    """
    before, version = folder.read_benchmarks(trial), importlib.metadata.version("lm_eval")
    tasks = {score.task for score in scores}
    comparable = before.scores if before and before.lm_eval == version else ()
    kept = [score for score in comparable if score.task not in tasks]
    benchmarks = Benchmarks(lm_eval=version, scores=(*kept, *scores))
    file = folder.benchmarks_file(trial)
    ensure_folder(file.parent)
    write_record(file, benchmarks)
    try:
        with folder.held():
            _renew(folder, trial, benchmarks, source, say)
    except HeldError:
        say("a run holds this job: its cards show the benchmarks once evaluated again after it")


def _renew(folder: RunFolder, trial: int, benchmarks: Benchmarks, source: Path, say: Callable[[str], None]) -> None:
    for export in (folder.export_folder(trial, form) for form in FORMATS):
        if is_sealed(export):
            made = read_record(export / REPRODUCE, Reproduction)
            (export / DONE).unlink()  # if interrupted from here on, the export is written again
            seal_made(export, made, source, benchmarks, detectors=folder.read_detectors(export.name))
            say(f"the card of {export} now shows the benchmarks; `abliterate upload` delivers it")
    if folder.report_file.exists():
        write_reports(folder)
