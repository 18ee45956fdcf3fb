"""What must survive a machine before it is ended, and whether mirrors and targets hold it now."""

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
from job.storage.jobs import job_settings, jobs_in
from job.storage.run_folder import RunFolder
from job.upload.proof import delivery_problem

# The preflight check with which a user vouches that places survive the machine whose file system does not tell.
VOUCHED = "rental.survival"
_SNAPSHOT_SECONDS = 300.0
# What does not answer within these times counts as not known, and as not safe: the machine bills meanwhile.
_HOLDER_SECONDS, _PROOF_SECONDS = 60.0, 1800.0

Say = Callable[[str], None]


def undelivered(workspace: Path, own: RunFolder | None) -> str:
    """Return which other job of a workspace is not delivered, "" if there is none.

    Args:
        workspace: Folder of all run folders.
        own: The job whose start has ended; None where it is not known, so that every job is another. One that is alone
            is taken for it: a stop loses nothing of it, and before a destroy it would have to be known.
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
            delivered = False  # whatever is wrong with it, it is somebody's work
        if folder.is_held():
            return f"job {folder.path.name} in {workspace} is running"
        if not delivered:
            return f"job {folder.path.name} in {workspace} is not delivered"
    return ""


def other_holder(folder: RunFolder | None, settings: Settings | None, say: Say) -> str:
    """Return who else holds a job, here or at its checkpoint, "" if nobody is known to."""
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
        except Exception as error:  # whatever it is: not known
            say(f"warning: whether another machine holds job {folder.path.name} is not known: {_line(error)}")
            return ""
        return f"job {folder.path.name} is held by {found[0]}" if found else ""

    return _within(_HOLDER_SECONDS, ask, "")


def unsaved(folder: RunFolder | None, settings: Settings | None, say: Say, *, elsewhere: bool = False) -> str:
    """Return what of a job would be lost with this machine, "" if all was found elsewhere just now.

    Args:
        folder: Its run folder; None where it is not known.
        settings: How its checkpoint and targets are reached; None where that is not known.
        say: Told of what is tried again.
        elsewhere: Another machine goes on with it, so that its checkpoint is ahead of this folder.
    """
    if folder is None or settings is None or not (elsewhere or folder.job_file.exists()):
        return "which job this machine holds is not known"
    try:
        if elsewhere:
            return _not_overtaken(folder, settings, say) or _undelivered_export(folder, settings)
        with folder.held():  # so that nothing changes meanwhile
            return _not_mirrored(folder, settings, say) or _undelivered_export(folder, settings)
    except HeldError as error:
        return str(error)
    except (JobError, OSError) as error:
        return f"job {folder.path.name} cannot be found elsewhere: {_line(error)}"


def all_unsaved(workspace: Path, folder: RunFolder | None, settings: Settings | None, say: Say, **how: bool) -> str:
    """Return what of any job of a workspace would be lost with this machine; see `unsaved`."""

    def look() -> str:
        problem = unsaved(folder, settings, say, **how)
        for other in jobs_in(workspace):
            if problem:
                break
            if folder is None or other.path.name != folder.path.name:
                problem = unsaved(other, _settings(other), say)
        return problem

    late = f"checkpoint and targets have not told within {_PROOF_SECONDS / 60:.0f} minutes what they hold"
    return _within(_PROOF_SECONDS, look, late)


def _within(seconds: float, call: Callable[[], str], late: str) -> str:
    """Return what a call returns, or `late` if that takes longer; the call is then left behind."""
    found = [late]

    def run() -> None:
        try:
            found[0] = call()
        except Exception as error:  # whatever it is, nothing was proved
            found[0] = f"what is safe could not be found out: {_line(error)}"

    thread = threading.Thread(target=run, name="safekeeping", daemon=True)
    thread.start()
    thread.join(seconds)
    return found[0]


def _settings(folder: RunFolder) -> Settings | None:
    try:
        return job_settings(folder)
    except JobError:
        return None


def _place(uri: str | None, settings: Settings) -> bool:
    """Return whether a place counts as one off this machine."""
    return uri is not None and (VOUCHED in settings.allow or outlives_machine(uri))


def _not_overtaken(folder: RunFolder, settings: Settings, say: Say) -> str:
    if not _place(settings.checkpoint, settings):
        return _no_checkpoint(folder, settings)
    with open_checkpoint(settings, say) as mirror:
        return mirror.overtaken(folder)


def _not_mirrored(folder: RunFolder, settings: Settings, say: Say) -> str:
    if not _place(settings.checkpoint, settings):
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
    """Take the snapshot that a start which was killed could not take, where the checkpoint knows the job."""
    if not any(head.job_id == folder.path.name and head.files for head in mirror.jobs()):
        return False  # somebody has removed it, which is not for this machine to undo
    claim = mirror.claim(folder, folder.read_job().identity, say)
    claim.start()
    return claim.close(seconds=_SNAPSHOT_SECONDS)


def _undelivered_export(folder: RunFolder, settings: Settings) -> str:
    """Return which export is at no target off this machine, "" if none has to be or all are."""
    records = folder.read_uploads()
    for name, manifest in _exports(folder, settings, records):
        targets = [target for target in settings.upload if _place(target, settings)]
        if not targets:
            return f"export {name} of job {folder.path.name} was delivered to no place off this machine"
        if not manifest:
            return f"what export {name} of job {folder.path.name} consisted of was not written down"
        for target in targets:
            if problem := delivery_problem(target, manifest, settings):
                return f"export {name} of job {folder.path.name} is not delivered: {problem}"
    return ""


def _exports(folder: RunFolder, settings: Settings, records: list[Upload]) -> Iterator[tuple[str, str]]:
    """Yield the exports that must survive, with the sha256 of their manifests: the chosen one, else all there are."""
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
