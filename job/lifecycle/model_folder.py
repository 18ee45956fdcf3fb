"""Local folder of the model's files at the pinned commit."""

from __future__ import annotations

from pathlib import Path

from job.config.schema import Settings
from job.errors import UsageError
from job.model.files import fetch_model, list_model, parse_model
from job.records import JobRecord
from job.storage.events import Events
from job.storage.identity import model_identity
from job.text.redaction import redacted


def model_folder(record: JobRecord, settings: Settings, events: Events) -> Path:
    """Return the folder of the model's files, downloaded at the pinned commit if missing.

    Raises UsageError if a local folder changed, ImpossibleJobError if the model is gone, or MachineError.
    """
    if redacted(model_identity(settings)) != redacted(record.identity["model"]):
        raise UsageError(
            f"the model of job {record.job_id} has changed",
            remedy="restore the model at the path that job.json names",
        )
    source = parse_model(settings.model)
    if source.kind == "folder":
        return Path(source.name)
    listing = list_model(source, record.model_commit, events.say)
    events.emit("download_started", f"fetching {source.describe()}: {listing.size / 2**30:.1f} GiB in all")
    return fetch_model(source, listing, events.say)
