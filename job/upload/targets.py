"""Delivery to any target by URI: file:///dir, hf://user/repo[@branch], s3://bucket/prefix."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlparse

from job.config.schema import Settings
from job.errors import DeliveryError
from job.records import Upload
from job.storage.atomic import make_folder, write_record
from job.storage.events import Events
from job.storage.exports import DONE
from job.storage.run_folder import RunFolder

if TYPE_CHECKING:
    from job.transfer.s3 import S3Capabilities, S3Options


def deliver_to_all(folder: RunFolder, export: Path, settings: Settings, events: Events) -> list[tuple[str, str]]:
    """Deliver a complete export to every target; return the failed ones with reasons."""
    failed = []
    figures = folder.read_figures(export.name)
    message = f"{export.name}: {figures.refusals}/{figures.bad_prompts} refusals, KL {figures.kl or 0:.3g}"
    total = sum(path.stat().st_size for path in export.iterdir() if path.is_file())
    for target in settings.upload:
        events.emit("delivery_started", f"delivering to {target}", target=target)
        try:
            with events.progress(f"bytes to {target}", total) as advance:
                deliver(
                    export,
                    target,
                    settings,
                    state=folder.uploads_state,
                    message=message,
                    report=events.say,
                    progress=advance,
                )
        except DeliveryError as error:
            failed.append((target, error.line))
            upload = Upload(target=target, export=export.name, state="failed", error=error.line)
        else:
            manifest = (export / DONE).read_text().strip()
            upload = Upload(target=target, export=export.name, state="done", manifest=manifest)
        folder.record_upload(upload)
        events.emit("delivery", f"delivery to {target}: {upload.state}", **upload.model_dump())
    return failed


def deliver(
    export: Path,
    target: str,
    settings: Settings,
    *,
    state: Path,
    message: str,
    report: Callable[[str], None],
    progress: Callable[[int], None],
) -> None:
    """Deliver a complete export to a target and verify it; another run continues. Raises DeliveryError.

    `state` is the folder of started uploads, `message` a commit's first line; `progress` gets arrived bytes (S3).
    """
    scheme = urlparse(target).scheme
    if scheme == "file":
        from job.transfer.folders import deliver as to_folder

        to_folder(export, target)
    elif scheme == "hf":
        from job.upload.hub import HubOptions
        from job.upload.hub import deliver as to_hub

        options = HubOptions(
            visibility=settings.visibility, pull_request=settings.hub.pull_request, commit_message=message
        )
        to_hub(export, target, options, report=report, progress=lambda _: None)
    else:
        from job.upload.s3 import deliver as to_s3

        known = _remembered(target, settings, state)
        to_s3(export, target, state, s3_options(settings), progress=progress, capabilities=known)


def _remembered(target: str, settings: Settings, state: Path) -> S3Capabilities | None:
    from job.transfer.s3 import S3Capabilities

    try:
        return S3Capabilities.model_validate_json(_memory(target, settings, state).read_bytes())
    except (OSError, ValueError):
        return None


def _memory(target: str, settings: Settings, state: Path) -> Path:
    digest = hashlib.sha256(f"{target}\n{settings.s3.model_dump_json()}".encode()).hexdigest()
    return state / f"server-{digest[:24]}.json"


def probe(target: str, settings: Settings, state: Path | None = None) -> str:
    """Prove that a target accepts deliveries, leaving nothing; return what was found. Raises DeliveryError."""
    if urlparse(target).scheme == "hf":
        from job.upload.hub import HubOptions
        from job.upload.hub import probe as probe_hub

        found = probe_hub(target, HubOptions(visibility=settings.visibility, pull_request=settings.hub.pull_request))
        if not found.ok:
            raise DeliveryError(found.what, remedy=found.remedy)
        return found.what
    from job.transfer.s3 import probe as probe_s3

    quirks = probe_s3(target, s3_options(settings))
    if state is not None:
        make_folder(state)
        write_record(_memory(target, settings, state), quirks)
    return "; ".join(["writing, completing and deleting work", *quirks.quirks])


def s3_options(settings: Settings) -> S3Options:
    """Return the options of S3 from the settings."""
    from job.transfer.s3 import S3Options

    return S3Options(**settings.s3.model_dump())
