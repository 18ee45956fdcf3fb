"""The run folder of a finished, delivered and mirrored job, written without computing anything."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from job.config.load import load_settings
from job.data.prompts import Prompt, PromptSets
from job.mirror import MirrorOptions, open_mirror
from job.records import Figures, JobRecord, Manifest, ManifestEntry, State, Upload
from job.storage.atomic import sha256_file, write_record
from job.storage.exports import DONE, MANIFEST
from job.storage.identity import job_id
from job.storage.run_folder import RunFolder
from job.transfer.folders import deliver as to_folder
from job.transfer.s3 import S3Options
from job.upload.s3 import deliver as to_s3

FIGURES = Figures(bad_prompts=10, refusals=1, good_prompts=10, false_refusals=0, kl=0.1)


@dataclass
class FinishedJob:
    """A finished job.

    Attributes:
        workspace: Folder of all run folders.
        folder: Its run folder.
        checkpoint: URI of its mirror.
        target: URI of its delivery.
        s3: Access to S3.
    """

    workspace: Path
    folder: RunFolder
    checkpoint: str | None
    target: str | None
    s3: S3Options | None = None

    def mirror(self) -> None:
        assert self.checkpoint is not None
        with open_mirror(self.checkpoint, MirrorOptions(s3=self.s3)) as mirror:
            claim = mirror.claim(self.folder, self.folder.read_job().identity, lambda _: None)
            claim.start()
            assert claim.close()

    @property
    def export(self) -> Path:
        return self.folder.export_folder(1, "merged")


def finished_job(
    workspace: Path,
    checkpoint: str | None,
    target: str | None,
    *,
    seed: int = 7,
    state: str = "finished",
    s3: S3Options | None = None,
    **settings: Any,
) -> FinishedJob:
    """Write a finished job, deliver and mirror it.

    Args:
        workspace: Folder of all run folders.
        checkpoint: URI of its mirror, None: not mirrored.
        target: URI of its delivery, None: not delivered.
        seed: Distinguishes it from other jobs.
        state: Contents of state.json.
        s3: Access to S3.
        **settings: Of the job, by dotted key.
    """
    identity = {"model": {"repository": f"cook/soup-{seed}"}, "seed": seed}
    folder = RunFolder(workspace / job_id(identity))
    given = {"model": "cook/soup", "workspace": str(workspace), "trials": 3, "seed": seed, **settings}
    given |= {"checkpoint": checkpoint} if checkpoint else {}
    given |= {"upload": [target]} if target else {}
    loaded = load_settings(given).settings
    (folder.path / "figures").mkdir(parents=True)
    _write_study(folder.study_file)
    one = (Prompt(user="Where is the kettle?"),)
    prompts = PromptSets(
        good=one, bad=one, good_search=one, bad_search=one, good_report=one, bad_report=one, sources={}, commits={}
    )
    write_record(folder.prompts_file, prompts)
    write_record(folder.figures_file("base"), FIGURES)
    write_record(folder.figures_file("trial-0001"), FIGURES)
    folder.events_file.write_text('{"event": "job_started"}\n{"event": "trial"}\n')
    folder.report_file.write_text("# report\n")
    folder.page_file.write_text("<p>report</p>\n")
    # With the ends of rentals, as former versions kept them.
    record = JobRecord(
        job_id=folder.path.name,
        identity=identity,
        settings=loaded.model_dump(mode="json"),
        startup_trials=1,
        versions={},
    )
    write_record(folder.job_file, record)
    job = FinishedJob(workspace, folder, checkpoint, target, s3)
    manifest = _write_export(job.export)
    if target is not None:
        _deliver(job, target)
        write_record_list(folder.uploads_file, [_upload(target, manifest)])
    chosen = 1 if state == "finished" else None
    write_record(folder.state_file, State.model_validate({"state": state, "trials": 3, "chosen": chosen}))
    if checkpoint is not None:
        job.mirror()
    return job


def _upload(target: str, manifest: str) -> dict[str, Any]:
    upload = {"target": target, "export": "trial-0001", "state": "done", "manifest": manifest}
    return {name: value for name, value in upload.items() if name in Upload.model_fields}


def write_record_list(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text(json.dumps(records))


def _write_study(path: Path) -> None:
    with closing(sqlite3.connect(path)) as db, db:
        db.execute("CREATE TABLE trials (number INTEGER, state TEXT)")
        db.executemany("INSERT INTO trials VALUES (?, 'COMPLETE')", [(number,) for number in range(3)])


def _write_export(export: Path) -> str:
    """Write an export and return its manifest's sha256."""
    export.mkdir(parents=True)
    (export / "config.json").write_text("{}\n")
    (export / "model.safetensors").write_bytes(bytes(range(256)) * 100)
    files = {path.name: ManifestEntry(sha256=sha256_file(path), size=path.stat().st_size) for path in export.iterdir()}
    write_record(export / MANIFEST, Manifest(files=files))
    (export / DONE).write_text(sha256_file(export / MANIFEST) + "\n")
    return sha256_file(export / MANIFEST)


def _deliver(job: FinishedJob, target: str) -> None:
    if target.startswith("file:"):
        to_folder(job.export, target)
        # A separate copy, so that tests may damage it without damaging the export.
        weights = Path(target.removeprefix("file://")) / "model.safetensors"
        data = weights.read_bytes()
        weights.unlink()
        weights.write_bytes(data)
    else:
        to_s3(job.export, target, job.folder.uploads_state, job.s3)
