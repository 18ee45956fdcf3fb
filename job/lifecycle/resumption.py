"""Continue a job from its run folder or mirror, with settings that only extend it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

from job.config.checks import require_targets
from job.config.load import asked_ends, leaves
from job.config.origins import HERE, TRUST, left_out_line
from job.config.schema import ENDS, Settings
from job.lifecycle.locate import Whereabouts
from job.lifecycle.lock import as_in_preflight
from job.lifecycle.start import JobStart
from job.mirror.vetting import as_given, require_same_contents, with_trust
from job.records import JobRecord
from job.storage.identity import stored
from job.storage.jobs import job_settings
from job.storage.run_folder import RunFolder
from job.system.tempdirs import scratch


def resumption(
    where: Whereabouts,
    ends: Mapping[str, str | None] | None = None,
    say: Callable[[str], None] = lambda _: None,
    **others: object,
) -> JobStart:
    """Return the start that continues a job, from its run folder or checkpoint.

    A checkpoint contributes only vetted values (`job.mirror.vetting`); `say` receives the others. `ends` holds
    `when_done` and `when_failed` of this command line, never those of an earlier start. Raises UsageError, MachineError
    if the checkpoint cannot be used, or DeliveryError if its contents cannot.
    """
    options = {name: value for name, value in (ends or {}).items() if value is not None}
    # As for all settings: the environment, then options, then --set.
    given = {**where.given, **asked_ends(options), **others}
    given |= {name: value for name, value in where.assigned.items() if name in ENDS}
    if isinstance(targets := given.get("upload"), list):
        require_targets(targets)  # before anything is restored
    folder, record, settings = (
        _read_local_job(where, given) if where.checkpoint is None else _read_mirrored_job(where, given, say)
    )
    first = record
    used = {name: value for name, value in leaves(settings.model_dump(mode="json")).items() if name in HERE}

    def opened() -> tuple[JobRecord, Settings]:
        # The run folder may have been filled since from a checkpoint that has changed.
        record, found = folder.read_job(), job_settings(folder, whole=True, **as_given({**used, **given}))
        with_trust(record, found, given, before=first)
        if where.checkpoint is not None:
            require_same_contents(record, found, prompts=not folder.prompts_file.exists())
        return record.model_copy(update={"settings": stored(found)}), found

    return JobStart(folder, record.identity, settings, opened, names_code=TRUST in given)


def _read_local_job(where: Whereabouts, given: Mapping[str, Any]) -> tuple[RunFolder, JobRecord, Settings]:
    folder = where.folder()
    record, settings = folder.read_job(), job_settings(folder, whole=True, **as_given(given))
    with_trust(record, settings, given)
    return folder, record, settings


def _read_mirrored_job(
    where: Whereabouts, given: Mapping[str, Any], say: Callable[[str], None]
) -> tuple[RunFolder, JobRecord, Settings]:
    """Return a mirrored job's record and settings, with its future run folder."""
    with ExitStack() as opened:
        mirror = as_in_preflight(lambda: opened.enter_context(where.mirror()))
        head = as_in_preflight(lambda: where.mirrored(mirror))
        place = opened.enter_context(scratch("mirror"))
        folder = RunFolder(where.workspace / head.job_id)
        fetched = mirror.fetch(head.job_id, place)
        record = fetched.folder.read_job()
        here = as_given({**_of_this_side(folder), **given})
        settings = job_settings(fetched.folder, whole=True, **here, workspace=str(where.workspace))
        with_trust(record, settings, given, before=folder.read_job() if folder.job_file.exists() else None)
        require_same_contents(record, settings, prompts=not fetched.folder.prompts_file.exists())
    if line := left_out_line(mirror.uri, fetched.left_out, leaves(settings.model_dump(mode="json"))):
        say(line)
    return folder, record, settings


def _of_this_side(folder: RunFolder) -> dict[str, Any]:
    """Return settings about this machine from a local run folder; {} without one."""
    if not folder.job_file.exists():
        return {}
    return {name: value for name, value in leaves(folder.read_job().settings).items() if name in HERE - {"workspace"}}
