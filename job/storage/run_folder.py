"""The run folder: one per job in the workspace, written atomically, held by one run at a time."""

from __future__ import annotations

import json
import re
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from job.errors import HeldError, JobError
from job.records import DetectorReport, ExportFormat, Figures, JobRecord, State, Upload
from job.records.evaluation import Benchmarks
from job.storage.atomic import (
    cannot_read,
    cannot_write,
    make_folder,
    read_record,
    sweep_temporaries,
    write_atomically,
    write_record,
)
from job.storage.identity import MEMO
from job.system.locks import Lock, LockedError, is_locked
from job.system.processes import HolderRecord, this_process
from job.text.redaction import redact

# Names of jobs: they come from folders and checkpoints, and go into paths.
JOB_ID = re.compile(r"[0-9a-f]{12}")
# A status command holds the lock for an instant to see whether a run does.
_LOCK_SECONDS = 2.0
_UPLOADS = TypeAdapter(list[Upload])
_MADE_AGAIN = "run the job again: it makes it anew"
_SCORED_AGAIN = "remove the file, or run `abliterate evaluate --trial N --tasks quick`, which makes it anew"
_DETECTED_AGAIN = "remove the file: card and report then omit detectors"
_MEASURED_AGAIN = "run the job again, or `abliterate export --trial N` for another trial's: that measures it anew"


class RunFolder:
    """Paths and records of a job's folder."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.job_file = path / "job.json"
        self.state_file = path / "state.json"
        self.stacks_file = path / "stacks.txt"
        self.meter_file = path / "meter.json"
        self.study_file = path / "study.db"
        self.events_file = path / "events.jsonl"
        self.preflight_file = path / "preflight.json"
        self.holder_file = path / "holder.json"
        self.uploads_file = path / "uploads.json"
        self.uploads_state = path / "uploads"
        self.prompts_file = path / "prompts.json"
        self.reproduces_file = path / "reproduces.json"
        self.trusted_file = path / "trusted.json"
        self.geometry_file = path / "directions" / "geometry.json"
        self.path_file = path / "directions" / "path.json"
        # What the descent goes on from; made again where it is missing, and in no mirror.
        self.gradient_folder = path / "gradient"
        self.rescored_file = path / "figures" / "rescored.json"
        self.finalists_file = path / "figures" / "finalists.json"
        # A judge's answers, by hashes of what it was asked; never mirrored.
        self.verdicts_file = path / "answers" / "verdicts.txt"
        self.report_file = path / "report.md"
        self.page_file = path / "report.html"
        # With responses to prompts that have the behaviour, which is why it has a name of its own that no mirror knows.
        self.answers_page_file = path / "report-with-answers.html"
        self.lock_file = path / ".lock"
        self.export_link = path / "export"

    def export_folder(self, trial: int, form: ExportFormat) -> Path:
        """Return the folder of a trial's export in a format."""
        return self.path / "exports" / (f"trial-{trial:04d}" + ("" if form == "merged" else f"-{form}"))

    def figures_file(self, subject: str) -> Path:
        """Return the metrics file of a subject: "base" or "trial-NNNN"."""
        return self.path / "figures" / f"{subject}.json"

    def answers_file(self, subject: str) -> Path:
        """Return the file of a subject's sampled responses; never mirrored."""
        return self.path / "answers" / f"{subject}.json"

    def evaluation_file(self, trial: int) -> Path:
        """Return the file of a trial's `abliterate evaluate` results."""
        return self.path / f"evaluation-{trial:04d}.json"

    def benchmarks_file(self, trial: int) -> Path:
        """Return the file of a trial's benchmark scores, which its card and reports show."""
        return self.figures_file(f"benchmarks-{trial:04d}")

    def read_benchmarks(self, trial: int) -> Benchmarks | None:
        """Return a trial's benchmark scores, None if there are none."""
        file = self.benchmarks_file(trial)
        return read_record(file, Benchmarks, remedy=_SCORED_AGAIN) if file.exists() else None

    def detectors_file(self, export: str) -> Path:
        """Return the file of an export's detector results."""
        return self.figures_file(f"{export}-detectors")

    def read_detectors(self, export: str) -> DetectorReport | None:
        """Return an export's detector results, None if there are none."""
        file = self.detectors_file(export)
        return read_record(file, DetectorReport, remedy=_DETECTED_AGAIN) if file.exists() else None

    def read_job(self) -> JobRecord:
        """Return job.json."""
        return read_record(self.job_file, JobRecord)

    def read_state(self) -> State | None:
        """Return state.json, None before the first start."""
        return read_record(self.state_file, State, remedy=_MADE_AGAIN) if self.state_file.exists() else None

    def read_figures(self, subject: str) -> Figures:
        """Return the metrics of "base" or of an export."""
        return read_record(self.figures_file(subject), Figures, remedy=_MEASURED_AGAIN)

    def read_uploads(self) -> list[Upload]:
        """Return uploads.json, empty before the first delivery."""
        if not self.uploads_file.exists():
            return []
        try:
            return _UPLOADS.validate_json(self.uploads_file.read_bytes())
        except (ValidationError, OSError) as error:
            remedy = "move it away: what is delivered is found and not sent again"
            raise cannot_read(self.uploads_file, error, remedy=remedy) from error

    def record_upload(self, upload: Upload) -> None:
        """Record a delivery in uploads.json, replacing its target's entry."""
        others = [item for item in self.read_uploads() if item.target != redact(upload.target)]
        items = [json.loads(item.model_dump_json()) for item in (*others, upload)]
        write_atomically(self.uploads_file, (json.dumps(items, indent=2) + "\n").encode())

    def discard(self) -> None:
        """Remove a job's folder that never got going, and its otherwise empty workspace."""
        shutil.rmtree(self.path, ignore_errors=True)
        workspace = self.path.parent
        if all(path.name == MEMO for path in workspace.iterdir()):
            shutil.rmtree(workspace, ignore_errors=True)

    def holder(self) -> HolderRecord | None:
        """Return the job's current or last holder, None if unknown."""
        try:
            return HolderRecord.model_validate_json(self.holder_file.read_bytes())
        except (OSError, ValidationError):
            return None

    def is_held(self) -> bool:
        """Return whether a run holds this job now."""
        return is_locked(self.lock_file)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold this job for the block, under a lock that ends with the process. Raises HeldError."""
        lock = Lock(self.lock_file)
        try:
            make_folder(self.path)
            lock.acquire(_LOCK_SECONDS)
        except LockedError as error:
            holder = error.owner or self.holder()
            raise HeldError(
                f"job {self.path.name} is held by {holder.describe() if holder else 'another process'}",
                remedy=error.remedy,
                elsewhere=holder is not None and holder.process.boot_id != this_process().boot_id,
            ) from None
        except OSError as error:
            raise cannot_write(self.lock_file, error) from error
        try:
            own = HolderRecord(process=this_process(), host=socket.gethostname())
            write_record(self.holder_file, own)
            since = self.holder_file.stat().st_mtime
            sweep_temporaries(self.path, since, below=True)
            sweep_temporaries(self.path.parent, since)
            try:
                yield
            finally:
                self._note_release(own)
        finally:
            lock.release()

    def _note_release(self, own: HolderRecord) -> None:
        """Note that this process no longer works on the job, unless another one has taken over."""
        try:
            if self.holder() == own:
                write_record(self.holder_file, own.model_copy(update={"released": True}))
        except (OSError, JobError):
            return  # the next start may take this process for one that is still at work, until it ends
