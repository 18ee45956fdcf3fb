"""What must survive before a machine is ended, and whether mirrors and targets hold it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from job.config.schema import Settings
from job.errors import HeldError, JobError
from job.lifecycle.lock import open_checkpoint
from job.lifecycle.outcome import completed
from job.mirror import Mirror
from job.preflight.mounts import outlives_machine
from job.records import Upload
from job.storage.exports import DONE, is_sealed
from job.storage.jobs import job_settings, jobs_in, settings_if_readable
from job.storage.run_folder import RunFolder
from job.upload.proof import delivery_problem

# The preflight check by which a user vouches that a place outlives the machine.
VOUCHED = "rental.survival"
_SNAPSHOT_SECONDS = 300.0
# Without an answer in this time, a place counts as unsafe: the machine bills meanwhile.
_HOLDER_SECONDS, _PROOF_SECONDS = 60.0, 1800.0

Say = Callable[[str], None]


def undelivered(workspace: Path, own: RunFolder | None) -> str:
    """Return another job in a workspace that is undelivered, or "".

    `own` is the job that ended. If it is unknown (None), a single job is taken for it: a stop loses nothing, and a
    destroy requires it to be known.
    """
    folders = jobs_in(workspace)
    if own is None and len(folders) == 1 and not folders[0].is_held():
        return ""
    for folder in folders:
        if own is not None and folder.path.name == own.path.name:
            continue
        try:
            settings = job_settings(folder)
            delivered = bool(settings.upload) and completed(folder, settings) is not None
        except (JobError, OSError, ValueError):
            delivered = False  # a damaged job is still somebody's work
        if folder.is_held():
            return f"job {folder.path.name} in {workspace} is running"
        if not delivered:
            return f"job {folder.path.name} in {workspace} is not delivered"
    return ""


def other_holder(folder: RunFolder | None, settings: Settings | None, say: Say) -> str:
    """Return another holder of a job, here or at its checkpoint, or ""."""
    if folder is None:
        return ""
    if folder.is_held():
        return f"another process on this machine holds job {folder.path.name}"
    if settings is None or settings.checkpoint is None:
        return ""

    def ask() -> str:
        try:
            with open_checkpoint(settings, say) as mirror:
                found = mirror.other_holder(folder.path.name)
        except Exception as error:  # any failure means unknown
            say(f"warning: cannot check whether another machine holds job {folder.path.name}: {_line(error)}")
            return ""
        return f"job {folder.path.name} is held by {found[0]}" if found else ""

    return _within(_HOLDER_SECONDS, ask, "")


def unsaved(folder: RunFolder | None, settings: Settings | None, say: Say, *, elsewhere: bool = False) -> str:
    """Return what would be lost of a job with this machine, "" if everything is stored elsewhere.

    `elsewhere` means that another machine continues it, so its checkpoint is ahead of this folder. Unknown folder or
    settings count as lost.
    """
    if folder is None or settings is None or not (elsewhere or folder.job_file.exists()):
        return "this machine's job is unknown"
    try:
        if elsewhere:
            return _not_overtaken(folder, settings, say) or _undelivered_export(folder, settings)
        with folder.held():  # so that nothing changes meanwhile
            return _not_mirrored(folder, settings, say) or _undelivered_export(folder, settings)
    except HeldError as error:
        return str(error)
    except (JobError, OSError) as error:
        return f"job {folder.path.name} was not found elsewhere: {_line(error)}"


def all_unsaved(workspace: Path, folder: RunFolder | None, settings: Settings | None, say: Say, **how: bool) -> str:
    """Return what would be lost of any job in a workspace; see `unsaved`."""

    def look() -> str:
        problem = unsaved(folder, settings, say, **how)
        for other in jobs_in(workspace):
            if problem:
                break
            if folder is None or other.path.name != folder.path.name:
                problem = unsaved(other, settings_if_readable(other), say)
        return problem

    late = f"checkpoint and targets did not show within {_PROOF_SECONDS / 60:.0f} minutes what they hold"
    return _within(_PROOF_SECONDS, look, late)


def _within(seconds: float, call: Callable[[], str], late: str) -> str:
    """Return a call's result, or `late` after a timeout, abandoning the call."""
    found = [late]

    def run() -> None:
        try:
            found[0] = call()
        except Exception as error:  # any failure means unproven
            found[0] = f"the check of checkpoint and targets failed: {_line(error)}"

    thread = threading.Thread(target=run, name="safekeeping", daemon=True)
    thread.start()
    thread.join(seconds)
    return found[0]


def _is_off_machine(uri: str | None, settings: Settings) -> bool:
    """Return whether a place is off this machine."""
    return uri is not None and (VOUCHED in settings.allow or outlives_machine(uri))


def _not_overtaken(folder: RunFolder, settings: Settings, say: Say) -> str:
    if not _is_off_machine(settings.checkpoint, settings):
        return _no_checkpoint(folder, settings)
    with open_checkpoint(settings, say) as mirror:
        return mirror.overtaken(folder)


def _not_mirrored(folder: RunFolder, settings: Settings, say: Say) -> str:
    if not _is_off_machine(settings.checkpoint, settings):
        return _no_checkpoint(folder, settings)
    with open_checkpoint(settings, say) as mirror:
        problem = mirror.shortfall(folder)
        if problem and _send_latest(mirror, folder, say):
            problem = mirror.shortfall(folder)
    return problem


def _no_checkpoint(folder: RunFolder, settings: Settings) -> str:
    where = f"only in {settings.checkpoint}, which is on it" if settings.checkpoint else "nowhere else"
    return f"study, directions, events and report of job {folder.path.name} are on this machine and {where}"


def _send_latest(mirror: Mirror, folder: RunFolder, say: Say) -> bool:
    """Take a snapshot that a killed start could not take, if the checkpoint knows the job."""
    if not any(head.job_id == folder.path.name and head.files for head in mirror.jobs()):
        return False  # removed by someone, which this machine must not undo
    claim = mirror.claim(folder, folder.read_job().identity, say)
    claim.start()
    return claim.close(seconds=_SNAPSHOT_SECONDS)


def _undelivered_export(folder: RunFolder, settings: Settings) -> str:
    """Return an export that must be delivered and is at no target off this machine, or ""."""
    records = folder.read_uploads()
    for name, manifest in _exports(folder, settings, records):
        targets = [target for target in settings.upload if _is_off_machine(target, settings)]
        if not targets:
            return f"export {name} of job {folder.path.name} was not delivered off this machine"
        if not manifest:
            return f"what export {name} of job {folder.path.name} consisted of was not recorded"
        for target in targets:
            if problem := delivery_problem(target, manifest, settings):
                return f"export {name} of job {folder.path.name} is not delivered: {problem}"
    return ""


def _exports(folder: RunFolder, settings: Settings, records: list[Upload]) -> Iterator[tuple[str, str]]:
    """Yield name and manifest's SHA-256 of exports to keep: the chosen trial's once the job has finished, else all."""
    state = folder.read_state()
    if state is not None and state.state == "finished" and state.chosen is not None:
        export = folder.export_folder(state.chosen, settings.export_format)
        if is_sealed(export):
            yield export.name, (export / DONE).read_text().strip()
        else:  # delivered by another machine
            yield export.name, next((one.manifest for one in records if one.export == export.name and one.manifest), "")
        return
    exports = folder.path / "exports"
    for export in sorted(exports.iterdir()) if exports.is_dir() else ():
        if is_sealed(export):
            yield export.name, (export / DONE).read_text().strip()


def _line(error: Exception) -> str:
    return error.line if isinstance(error, JobError) else str(error)
