"""Check that delivery targets can be written, leaving nothing there."""

from __future__ import annotations

import os
from pathlib import Path

from job.config.schema import Settings
from job.errors import DeliveryError
from job.preflight.checks import Check
from job.preflight.disk import writability
from job.preflight.inputs import PreflightInputs
from job.preflight.rental_checks import rental_checks
from job.transfer.folders import holds_something_else, target_folder
from job.upload.targets import probe


def delivery_checks(inputs: PreflightInputs) -> list[Check]:
    """Return the checks of all targets, and of the rental's end after a delivery."""
    settings = inputs.settings
    checks = [check for target in settings.upload for check in target_checks(target, settings, inputs.upload_state)]
    return checks if inputs.on else [*checks, *rental_checks(settings, inputs.rental, inputs.undelivered)]


def target_checks(target: str, settings: Settings, state: Path | None) -> list[Check]:
    """Return the checks of a target; `state` is the folder that caches a server's capabilities, or None."""
    if not target.startswith("file:"):
        return [_remote(target, settings, state)]
    folder = target_folder(target)
    fault = remedy = ""
    if os.path.ismount(folder):
        fault, remedy = "is a mount point, which a delivery cannot replace", "name a folder inside it"
    elif holds_something_else(folder):
        fault, remedy = "holds something else", "name a new or empty folder"
    held = Check(
        name="target.local",
        status="fail" if fault else "ok",
        measured=f"{folder} {fault or 'is ready for the result'}",
        needed="a folder that is empty, new, or holds an earlier delivery",
        remedy=remedy,
        scope="job",
    )
    return [held, writability(folder.parent)]  # a delivery is written beside it and renamed


def _remote(target: str, settings: Settings, state: Path | None) -> Check:
    name = f"target.{target.partition(':')[0]}"
    try:
        found = probe(target, settings, state)
    except DeliveryError as error:
        return Check(
            name=name,
            status="fail",
            measured=f"{target}: {error}",
            needed="permission to write",
            remedy=error.remedy,
            scope="job",
        )
    return Check(name=name, status="ok", measured=f"{target}: {found}", needed="permission to write")
